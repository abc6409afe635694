"""Experts on a CPU, where a product per expert is as fast as a grouped one: everything that an expert does is done
while its rows are in the cache, and what is as long as all rows together is kept to two tensors.

    forward     rows of x -> gate and up -> weight * activation(gate) * up -> down;   a token's results are summed
    backward    the same rows again, from x and from what gate and up gave

Weighting the hidden rows, not the results, leaves the results unneeded in the backward, and their gradient unweighted.

Shapes: N tokens, K experts chosen by each, S = N K rows; E experts, D width, F expert width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_kernels.permute import sort_by_expert


def serves(device: torch.device, dtype: torch.dtype, activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether `experts` may be computed here: on a CPU, with an activation that is known to have nothing to learn; and
    not where a compiler can have torch's grouped product, which it knows in bfloat16 alone."""
    if torch.compiler.is_compiling() and dtype == torch.bfloat16:
        return False
    if isinstance(activation, nn.Module):
        return device.type == "cpu" and not any(p.requires_grad for p in activation.parameters())
    return device.type == "cpu" and activation in (F.silu, F.gelu, F.relu, torch.relu)


@torch.compiler.disable  # a loop whose bounds are numbers of tokens
def experts(
    x_ND: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """See `grouped.experts`; `x_ND` and `weights_NK` have the dtype of the experts."""
    order_S, ends_E, place_NK = sort_by_expert(experts_NK, len(down_EDF))
    place_NK = place_NK % max(len(order_S), 1)  # -1, dropped: the last row, which then is nobody's, and zero
    return _Experts.apply(x_ND, weights_NK, gate_up_EFD, down_EDF, order_S, ends_E.tolist(), place_NK, activation)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        order_S: Tensor,
        ends: list[int],
        place_NK: Tensor,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        S, D = len(order_S), x_ND.shape[1]
        token_S = order_S // weights_NK.shape[1]
        weight_S1 = weights_NK.flatten().index_select(0, order_S)[:, None]
        gate_up_SF, out_SD = x_ND.new_empty(S, gate_up_EFD.shape[1]), x_ND.new_zeros(S, D)
        for e, rows in _owned(ends):
            gate_up = gate_up_SF[rows]
            torch.mm(x_ND.index_select(0, token_S[rows]), gate_up_EFD[e].t(), out=gate_up)
            hidden = _hidden(gate_up, activation).mul_(weight_S1[rows])
            torch.mm(hidden, down_EDF[e].t(), out=out_SD[rows])
        ctx.save_for_backward(x_ND, gate_up_EFD, down_EDF, order_S, token_S, weight_S1, place_NK, gate_up_SF)
        ctx.ends, ctx.activation = ends, activation
        return _summed(out_SD, place_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up_EFD, down_EDF, order_S, token_S, weight_S1, place_NK, gate_up_SF = ctx.saved_tensors
        to_x, _, to_gate_up, to_down = ctx.needs_input_grad[:4]
        grad_x_SD = x_ND.new_zeros(len(order_S), x_ND.shape[1]) if to_x else None
        grad_gate_up, grad_down = (
            torch.zeros_like(w, memory_format=torch.contiguous_format) if needed else None
            for w, needed in ((gate_up_EFD, to_gate_up), (down_EDF, to_down))
        )
        grad_weight_S = weight_S1.new_zeros(len(order_S))
        for e, rows in _owned(ctx.ends):
            token, weight = token_S[rows], weight_S1[rows]
            grad_out = grad_ND.index_select(0, token)
            grad_hidden = torch.mm(grad_out, down_EDF[e])  # of the weighted one
            with torch.enable_grad():
                gate_up = gate_up_SF[rows].detach().requires_grad_()
                hidden = _hidden(gate_up, ctx.activation)
            grad_weight_S[rows] = (grad_hidden * hidden.detach()).sum(-1)
            if grad_down is not None:
                torch.mm(grad_out.t(), hidden.detach() * weight, out=grad_down[e])
            (grad_gate_up_rows,) = torch.autograd.grad(hidden, gate_up, grad_hidden.mul_(weight))
            if grad_gate_up is not None:
                torch.mm(grad_gate_up_rows.t(), x_ND.index_select(0, token), out=grad_gate_up[e])
            if grad_x_SD is not None:
                torch.mm(grad_gate_up_rows, gate_up_EFD[e], out=grad_x_SD[rows])
        grad_weights = torch.empty_like(grad_weight_S).scatter_(0, order_S, grad_weight_S).view(place_NK.shape)
        grad_x = None if grad_x_SD is None else _summed(grad_x_SD, place_NK)
        return grad_x, grad_weights, grad_gate_up, grad_down, None, None, None, None


def _owned(ends: list[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def _hidden(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def _summed(rows_SD: Tensor, place_NK: Tensor) -> Tensor:
    """In float32, rounded once."""
    return F.embedding_bag(place_NK, rows_SD, mode="sum")
