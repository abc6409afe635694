"""Tokens into the order of their experts, and their experts' results back: what surrounds a grouped product.

    permute      each token's row to every expert that it chose       backward: the sum of the copies' gradients
    unpermute    the weighted sum of a token's results                backward: to each result and each weight

Nothing is added up by atomics: a row belongs to one choice of one token, and both ways go by `place`. A choice of no
expert (negative, or E and above: another rank's) is dropped; its place is -1, and a row of nobody is zero.

Shapes: N tokens, K choices of each, E experts, S = N K rows, D columns, d = D / 128 scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_kernels.dispatch import choose
from lit_kernels.fp8 import BLOCK, E4M3, Quantised, Scales, quantise_rows_reference


class Permuted(NamedTuple):
    """Rows of expert 0, then of expert 1, ..., within an expert in the order of the tokens.

    `ends_E` int32, where each expert's rows end; the rows behind the last one are zero. `place_NK` int64, the row of
    each choice. For the choices [[1], [0], [1]] of E=2: rows x[1], x[0], x[2], ends [1, 3], place [[1], [0], [2]].
    """

    rows_SD: Tensor
    ends_E: Tensor
    place_NK: Tensor


class PermutedQuantised(NamedTuple):
    """`Permuted` with values (S, D) and scales (S, d); the scale of a row of zeros is the smallest there is."""

    rows: Quantised
    ends_E: Tensor
    place_NK: Tensor


def sort_by_expert(experts_NK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order_S` (which choice, counted through (N, K), lies at a row), `ends_E` and `place_NK`; nothing is synchronised
    with the CPU."""
    dropped_NK = (experts_NK < 0) | (experts_NK >= E)
    key_S, order_S = experts_NK.masked_fill(dropped_NK, E).flatten().sort(stable=True)
    each_E = torch.arange(E, device=key_S.device, dtype=key_S.dtype)
    ends_E = torch.searchsorted(key_S, each_E, right=True, out_int32=True)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return order_S, ends_E, place_S.view_as(experts_NK).masked_fill(dropped_NK, -1)


def permute_reference(x_ND: Tensor, experts_NK: Tensor, E: int) -> Permuted:
    """By one index; the copies are made first, so that the backward sums them in float32 and rounds once."""
    N, D = x_ND.shape
    K = experts_NK.shape[1]
    order_S, ends_E, place_NK = sort_by_expert(experts_NK, E)
    rows_SD = x_ND[:, None].expand(N, K, D).reshape(N * K, D).index_select(0, order_S)
    return Permuted(rows_SD.masked_fill(_behind(ends_E, N * K)[:, None], 0), ends_E, place_NK)


def unpermute_reference(rows_SD: Tensor, place_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """sum_k weight_k * row_k in float32, of rows' dtype."""
    picked_NKD = rows_SD.index_select(0, place_NK.flatten().clamp(min=0)).unflatten(0, place_NK.shape)
    picked_NKD = picked_NKD.masked_fill((place_NK < 0)[..., None], 0)  # not by the weight: 0 * NaN
    return (picked_NKD * weights_NK.float()[..., None]).sum(1).to(rows_SD.dtype)


def permute_quantised_reference(x_ND: Tensor, experts_NK: Tensor, E: int, kind: Scales = "float") -> PermutedQuantised:
    """`permute`, then rows of FP8."""
    rows_SD, ends_E, place_NK = permute_reference(x_ND, experts_NK, E)
    return PermutedQuantised(quantise_rows_reference(rows_SD, kind), ends_E, place_NK)


def permute(x_ND: Tensor, experts_NK: Tensor, E: int, backend: str = "auto") -> Permuted:
    """Every token's row, sorted by the experts that it chose.

    Raises:
        ValueError: x and experts have different numbers of tokens.
    """
    if _backend("permute", backend, x_ND, experts_NK) == "torch":
        return permute_reference(x_ND, experts_NK, E)
    _, ends_E, place_NK = sort_by_expert(experts_NK, E)
    return Permuted(_permute(x_ND, place_NK, ends_E), ends_E, place_NK)


@torch.no_grad()
def permute_quantised(
    x_ND: Tensor, experts_NK: Tensor, E: int, kind: Scales = "float", backend: str = "auto"
) -> PermutedQuantised:
    """`permute` in FP8: a token is read and quantised once and written K times, with no K copies in bfloat16.

    The bytes of `permute` followed by `quantise_rows`; no gradient. Raises what `permute` does.
    """
    if _backend("permute", backend, x_ND, experts_NK, fp8=True) == "torch":
        return permute_quantised_reference(x_ND, experts_NK, E, kind)
    _, ends_E, place_NK = sort_by_expert(experts_NK, E)
    return PermutedQuantised(Quantised(*_permute_quantised(x_ND, place_NK, ends_E, kind)), ends_E, place_NK)


def unpermute(rows_SD: Tensor, place_NK: Tensor, weights_NK: Tensor, backend: str = "auto") -> Tensor:
    """sum_k weight_k * row of place_k for each token, (N, D) of rows' dtype; summed in float32, rounded once.

    Args:
        place_NK: as `permute` made it, no row twice and those of nobody last (else gradients are undefined on a
            GPU); -1 counts for nothing, and that weight's gradient is 0.

    Raises:
        ValueError: place and weights have different shapes.
    """
    if place_NK.shape != weights_NK.shape:
        raise ValueError(f"place is {tuple(place_NK.shape)}, weights {tuple(weights_NK.shape)}; valid: (N, K) for both")
    if choose("unpermute", backend, rows_SD.device, (place_NK.numel(), rows_SD.shape[1])).backend == "torch":
        return unpermute_reference(rows_SD, place_NK, weights_NK)
    return _unpermute(rows_SD, place_NK, weights_NK)


def _backend(op: str, backend: str, x_ND: Tensor, experts_NK: Tensor, fp8: bool = False) -> str:
    if experts_NK.dim() != 2 or x_ND.dim() != 2 or len(x_ND) != len(experts_NK):
        shapes = f"x is {tuple(x_ND.shape)}, experts {tuple(experts_NK.shape)}"
        raise ValueError(f"{shapes}; valid: (N, D) and (N, K). Type x.flatten(0, -2)")
    return choose(op, backend, x_ND.device, (experts_NK.numel(), x_ND.shape[1]), fp8).backend


def _behind(ends_E: Tensor, S: int) -> Tensor:
    """Which rows are nobody's."""
    return torch.arange(S, device=ends_E.device) >= ends_E[-1]


@torch.library.custom_op("lit_kernels::permute", mutates_args=())
def _permute(x: Tensor, place: Tensor, ends: Tensor) -> Tensor:
    from lit_kernels.gpu import permute

    return permute.permute(x, place, ends)


@_permute.register_fake
def _(x: Tensor, place: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(place.numel(), x.shape[1])


@torch.library.custom_op("lit_kernels::permute_backward", mutates_args=())
def _permute_backward(grad: Tensor, place: Tensor) -> Tensor:
    from lit_kernels.gpu import permute

    return permute.unpermute(grad, place, None)


@_permute_backward.register_fake
def _(grad: Tensor, place: Tensor) -> Tensor:
    return grad.new_empty(len(place), grad.shape[1])


_permute.register_autograd(
    lambda ctx, grad: (_permute_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@torch.library.custom_op("lit_kernels::permute_quantised", mutates_args=())
def _permute_quantised(x: Tensor, place: Tensor, ends: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from lit_kernels.gpu import permute

    return permute.permute_quantised(x, place, ends, kind == "power of two")


@_permute_quantised.register_fake
def _(x: Tensor, place: Tensor, ends: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    S, D = place.numel(), x.shape[1]
    return x.new_empty(S, D, dtype=E4M3), x.new_empty((D + BLOCK - 1) // BLOCK, S, dtype=torch.float32).t()


@torch.library.custom_op("lit_kernels::unpermute", mutates_args=())
def _unpermute(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    from lit_kernels.gpu import permute

    return permute.unpermute(rows, place, weights)


@_unpermute.register_fake
def _(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(len(place), rows.shape[1])


@torch.library.custom_op("lit_kernels::unpermute_backward", mutates_args=())
def _unpermute_backward(grad: Tensor, rows: Tensor, place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    from lit_kernels.gpu import permute

    return permute.unpermute_backward(grad, rows, place, weights)


@_unpermute_backward.register_fake
def _(grad: Tensor, rows: Tensor, place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _rows_and_weights(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    grad_rows, grad_weights = _unpermute_backward(grad, *ctx.saved_tensors)
    return grad_rows, None, grad_weights


_unpermute.register_autograd(
    _rows_and_weights, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
