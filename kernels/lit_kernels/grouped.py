"""Experts as one product per matrix, whatever number of tokens each got.

    tokens sorted by expert -> gate and up -> silu(gate) * up -> down -> weighted, back in the tokens' order

    torch     `F.grouped_mm`, on CPU and GPU
    triton    ours: one kernel for a product, which finds each expert's rows itself
    auto      as in `dispatch`: "grouped_mm", (E, S, F, D)

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

from lit_kernels import one_by_one
from lit_kernels.dispatch import choose
from lit_kernels.fp8 import Scales
from lit_kernels.grouped_fp8 import fp8_grouped_mm
from lit_kernels.permute import permute, unpermute
from lit_kernels.swiglu import silu_mul

ALIGNED = 16  # bytes: torch refuses other strides, on a CPU too
PRECISIONS = ("bf16", "fp8")


def grouped_mm(x_SD: Tensor, w_EFD: Tensor, ends_E: Tensor, *, backend: str = "auto") -> Tensor:
    """x w_e^T for the rows of each expert e, (S, F).

    Args:
        x_SD: rows of expert 0, then of expert 1, ...
        ends_E: int32, where each expert's rows end.

    Raises:
        ValueError: the dtypes differ, or (torch) D or F is no multiple of 16 bytes.
        UnsupportedError: Triton was asked for where it cannot run.
    """
    if x_SD.dtype != w_EFD.dtype:
        raise ValueError(f"x is {x_SD.dtype}, the experts are {w_EFD.dtype}; valid: one dtype for both")
    E, F_, D = w_EFD.shape
    if choose("grouped_mm", backend, x_SD.device, (E, len(x_SD), F_, D)).backend == "triton":
        return _grouped_mm(x_SD, w_EFD, ends_E, False)
    for name, size in (("D", x_SD.shape[1]), ("F", F_)):
        if size * x_SD.element_size() % ALIGNED:
            raise ValueError(f"{name}={size} of {x_SD.dtype}; valid: a multiple of {ALIGNED // x_SD.element_size()}")
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


@torch.library.custom_op("lit_kernels::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """x w_e^T, or x w_e if `transposed`."""
    from lit_kernels.gpu import grouped

    return grouped.grouped_mm(x.contiguous(), w.contiguous(), ends, transposed)


@_grouped_mm.register_fake
def _(x: Tensor, w: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2 if transposed else 1])


@torch.library.custom_op("lit_kernels::grouped_mm_weights", mutates_args=())
def _grouped_mm_weights(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """grad^T x over each expert's rows, (E, F, D)."""
    from lit_kernels.gpu import grouped

    return grouped.grouped_mm_weights(grad.contiguous(), x.contiguous(), ends)


@_grouped_mm_weights.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, w, ends = ctx.saved_tensors
    grad_x = _grouped_mm(grad, w, ends, not ctx.transposed) if ctx.needs_input_grad[0] else None
    grad_w = None
    if ctx.needs_input_grad[1]:
        grad_w = _grouped_mm_weights(*((x, grad) if ctx.transposed else (grad, x)), ends)
    return grad_x, grad_w, None, None


_grouped_mm.register_autograd(_gradients, setup_context=_keep)


def experts(
    x_ND: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
    *,
    backend: str = "auto",
    precision: str = "bf16",
    kind: Scales = "float",
) -> Tensor:
    """sum_k weight_k * down(activation(gate x) * up x) of the experts that each token chose, (N, D).

    Args:
        experts_NK: integers; a token's choice of none of the E (negative, or E and above) counts for nothing.
        gate_up_EFD: (E, 2F, D), the rows of the gate first.
        backend: of the products and of what surrounds them; on a CPU "torch" is `one_by_one.py` where that serves.
        precision: "bf16", which stands for the dtype of the experts, or "fp8" (both products and their gradients).
        kind: of FP8's scales, "float" or "power of two".

    Raises:
        ValueError: there is no such precision or backend, or the products do not take these sizes.
        UnsupportedError: the backend cannot run here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"experts got precision={precision!r}; valid: {', '.join(PRECISIONS)}")
    dtype, (E, F2, D) = gate_up_EFD.dtype, gate_up_EFD.shape
    x_ND, fp8 = x_ND.to(dtype), precision == "fp8"
    on_cpu = not fp8 and one_by_one.serves(x_ND.device, dtype, activation)
    if on_cpu and choose("grouped_mm", backend, x_ND.device, (E, experts_NK.numel(), F2, D)).backend == "torch":
        return one_by_one.experts(x_ND, experts_NK, weights_NK.to(dtype), gate_up_EFD, down_EDF, activation)  # type: ignore[call-arg]
    around = "auto" if backend == "emulate" else backend
    rows_SD, ends_E, place_NK = permute(x_ND, experts_NK, E, around)

    def product(x: Tensor, w: Tensor) -> Tensor:
        if fp8:
            return fp8_grouped_mm(x, w, ends_E, backend=backend, kind=kind)
        return grouped_mm(x, w, ends_E, backend=backend)

    gate_up_SF = product(rows_SD, gate_up_EFD)
    if activation is F.silu:
        hidden_SF = silu_mul(gate_up_SF, around)
    else:
        gate_SF, up_SF = gate_up_SF.chunk(2, dim=-1)
        hidden_SF = activation(gate_SF) * up_SF
    return unpermute(product(hidden_SF, down_EDF), place_NK, weights_NK, around)


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
