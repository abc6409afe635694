"""Experts as one product per matrix, whatever number of tokens each got (torch's grouped product, on CPU and GPU).

    tokens sorted by expert -> gate and up -> silu(gate) * up -> down -> weighted, back in the tokens' order

Rows behind the last expert's belong to nobody: torch leaves them unwritten, in gradients too (pytorch #154557); here
they are zero. An expert without rows gets a gradient of zeros.

Shapes: N tokens, K experts chosen by each, S = N K rows; E experts, D width, F expert width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNED = 16  # bytes: torch refuses other strides, on a CPU too


def grouped_mm(x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """x w_e^T for the rows of each expert e, (S, F).

    Args:
        x_SD: rows of expert 0, then of expert 1, ...
        ends_E: int32, where each expert's rows end.

    Raises:
        ValueError: D or F is no multiple of 16 bytes, or the dtypes differ.
    """
    for name, size in (("D", x_SD.shape[1]), ("F", w_EFD.shape[1])):
        if size * x_SD.element_size() % ALIGNED:
            raise ValueError(f"{name}={size} of {x_SD.dtype}; valid: a multiple of {ALIGNED // x_SD.element_size()}")
    if x_SD.dtype != w_EFD.dtype:
        raise ValueError(f"x is {x_SD.dtype}, the experts are {w_EFD.dtype}; valid: one dtype for both")
    return _GroupedMM.apply(x_SD, w_EFD, ends_E)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SD, w_EFD, ends_E)
        return _without_tail(F.grouped_mm(x_SD.contiguous(), w_EFD.transpose(1, 2), offs=ends_E), ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SD, w_EFD, ends_E = ctx.saved_tensors
        grad_SF = grad_SF.contiguous()  # that of a sum is expanded, with strides of 0, which torch refuses
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = _without_tail(F.grouped_mm(grad_SF, w_EFD.contiguous(), offs=ends_E), ends_E)
        if ctx.needs_input_grad[1]:
            grad_w = F.grouped_mm(grad_SF.t(), x_SD.contiguous(), offs=ends_E)
            empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
            grad_w = grad_w.masked_fill_(empty_E[:, None, None], 0)
        return grad_x, grad_w, None


def _without_tail(rows: Tensor, ends_E: Tensor) -> Tensor:
    tail_S1 = torch.arange(len(rows), device=rows.device)[:, None] >= ends_E[-1]
    return rows.masked_fill_(tail_S1, 0)


def experts(
    x_ND: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """sum_k weight_k * down(activation(gate x) * up x) of the experts that each token chose, (N, D).

    Args:
        experts_NK: integers below E; a token's choice of E or more counts for nothing.
        gate_up_EFD: (E, 2F, D), the rows of the gate first.
    """
    N, K = experts_NK.shape
    E, dtype = len(down_EDF), gate_up_EFD.dtype
    order_S = experts_NK.flatten().argsort(stable=True)
    counts_E = torch.bincount(experts_NK.flatten().clamp(max=E), minlength=E + 1)[:E]
    ends_E = counts_E.cumsum(0).to(torch.int32)
    rows_SD = x_ND.to(dtype).index_select(0, order_S // K)
    gate, up = grouped_mm(rows_SD, gate_up_EFD, ends_E).chunk(2, dim=-1)
    out_SD = grouped_mm(activation(gate) * up, down_EDF, ends_E)
    place_NK = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(N * K, device=order_S.device)).view(N, K)
    weights_NK = weights_NK.masked_fill(experts_NK >= E, 0).to(dtype)
    return F.embedding_bag(place_NK, out_SD, per_sample_weights=weights_NK, mode="sum")


def experts_reference(
    x_ND: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """The same by a loop over the experts."""
    out_ND = torch.zeros_like(x_ND)
    for e in range(len(down_EDF)):
        token, k = torch.where(experts_NK == e)
        gate, up = F.linear(x_ND[token], gate_up_EFD[e]).chunk(2, dim=-1)
        rows = F.linear(activation(gate) * up, down_EDF[e]) * weights_NK[token, k, None]
        out_ND = out_ND.index_add(0, token, rows.to(out_ND.dtype))
    return out_ND
