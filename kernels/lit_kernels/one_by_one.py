"""Experts on a CPU, where a product per expert is as fast as a grouped one: everything that an expert does is done
while its rows are in the cache, and what is as long as all rows together is kept to two tensors.

    forward     rows of x -> gate and up -> weight * activation(gate) * up -> down;   a token's results are summed
    backward    the same rows again, from x and from what gate and up gave

Weighting the hidden rows, not the results, leaves the results unneeded in the backward, and their gradient unweighted.
Below float32 experts have as many rows as `sizes.round_up` says: numbers that are new at every step cost a compilation
each. A row that pads reads the last token of its expert, with a weight of zero, and nobody reads it.

Shapes: N tokens, K experts chosen by each, P rows; E experts, D width, F expert width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_kernels.permute import sort_by_expert
from lit_kernels.sizes import round_up


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
    rows = _deal(experts_NK, len(down_EDF), compiled=x_ND.dtype in (torch.bfloat16, torch.float16))
    return _Experts.apply(x_ND, weights_NK, gate_up_EFD, down_EDF, rows, activation)


class _Rows(NamedTuple):
    """`slices`: each expert that has rows, and which. `choice_P`: which of the N K choices lies at a row. `pads_P`:
    whether the row is nobody's. `place_NK`: each choice's row; P, one behind the last, if it chose no expert."""

    slices: list[tuple[int, slice]]
    choice_P: Tensor
    pads_P: Tensor
    place_NK: Tensor


def _deal(experts_NK: Tensor, E: int, compiled: bool) -> _Rows:
    device = experts_NK.device
    order_S, ends_E, _ = sort_by_expert(experts_NK, E)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    order_S = order_S[: int(counts_E.sum())]
    sizes_E = torch.tensor([round_up(n) if compiled and n else n for n in counts_E.tolist()], device=device)
    stops_E = sizes_E.cumsum(0)
    shift_E = stops_E - sizes_E - (ends_E - counts_E)
    place_S = torch.arange(len(order_S), device=device) + shift_E.repeat_interleave(counts_E)
    owns_E = counts_E > 0
    choice_P = order_S[(ends_E[owns_E] - 1).long()].repeat_interleave(sizes_E[owns_E])
    choice_P[place_S] = order_S
    pads_P = torch.ones_like(choice_P, dtype=torch.bool).index_fill_(0, place_S, False)
    place_NK = torch.full(experts_NK.shape, len(choice_P), device=device)
    place_NK.view(-1)[order_S] = place_S
    stops = stops_E.tolist()
    slices = [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *stops], stops, strict=False)) if b > a]
    return _Rows(slices, choice_P, pads_P, place_NK)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        rows: _Rows,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        P = len(rows.choice_P)
        token_P = rows.choice_P // weights_NK.shape[1]
        weight_P1 = weights_NK.flatten()[rows.choice_P].masked_fill_(rows.pads_P, 0)[:, None]
        gate_up_PF, out_PD = x_ND.new_empty(P, gate_up_EFD.shape[1]), _with_nobodys(x_ND, P)
        for e, own in rows.slices:
            gate_up = gate_up_PF[own]
            torch.mm(x_ND.index_select(0, token_P[own]), gate_up_EFD[e].t(), out=gate_up)
            hidden = _hidden(gate_up, activation).mul_(weight_P1[own])
            torch.mm(hidden, down_EDF[e].t(), out=out_PD[own])
        ctx.save_for_backward(x_ND, gate_up_EFD, down_EDF, token_P, weight_P1, rows.place_NK, gate_up_PF)
        ctx.slices, ctx.activation = rows.slices, activation
        return _summed(out_PD, rows.place_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up_EFD, down_EDF, token_P, weight_P1, place_NK, gate_up_PF = ctx.saved_tensors
        to_x, _, to_gate_up, to_down = ctx.needs_input_grad[:4]
        grad_x_PD = _with_nobodys(x_ND, len(token_P)) if to_x else None
        grad_gate_up, grad_down = (
            torch.zeros_like(w, memory_format=torch.contiguous_format) if needed else None
            for w, needed in ((gate_up_EFD, to_gate_up), (down_EDF, to_down))
        )
        grad_weight_P = weight_P1.new_zeros(len(token_P) + 1)
        for e, own in ctx.slices:
            token, weight = token_P[own], weight_P1[own]
            grad_out = grad_ND.index_select(0, token)
            grad_hidden = torch.mm(grad_out, down_EDF[e])  # of the weighted one
            with torch.enable_grad():
                gate_up = gate_up_PF[own].detach().requires_grad_()
                hidden = _hidden(gate_up, ctx.activation)
            grad_weight_P[own] = (grad_hidden * hidden.detach()).sum(-1)
            if grad_down is not None:
                torch.mm(grad_out.t(), hidden.detach() * weight, out=grad_down[e])
            (grad_gate_up_rows,) = torch.autograd.grad(hidden, gate_up, grad_hidden.mul_(weight))
            if grad_gate_up is not None:
                torch.mm(grad_gate_up_rows.t(), x_ND.index_select(0, token), out=grad_gate_up[e])
            if grad_x_PD is not None:
                torch.mm(grad_gate_up_rows, gate_up_EFD[e], out=grad_x_PD[own])
        grad_x = None if grad_x_PD is None else _summed(grad_x_PD, place_NK)
        return grad_x, grad_weight_P[place_NK], grad_gate_up, grad_down, None, None


def _with_nobodys(like: Tensor, P: int) -> Tensor:
    """(P + 1, D), of which the last row, which stands for no expert, is zero."""
    rows = like.new_empty(P + 1, like.shape[1])
    rows[P].zero_()
    return rows


def _hidden(gate_up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def _summed(rows_PD: Tensor, place_NK: Tensor) -> Tensor:
    """In float32, rounded once."""
    return F.embedding_bag(place_NK, rows_PD, mode="sum")
