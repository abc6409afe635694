"""Cases of rows on their way to experts and back, bound by the memory's bandwidth. See kernels_measure.py.

Shapes: N tokens, C choices of each, E experts, S = N C rows, D columns."""

from __future__ import annotations

import torch
from bench.kernels_compare import exact
from bench.kernels_measure import Kind, Made, Place, Run, ways
from bench.kernels_streams import SCALE, backward, normal
from lit_kernels.permute import permute, permute_quantised, sort_by_expert, unpermute
from lit_kernels.quantise import quantise_rows
from torch import Tensor


def choices(place: Place, N: int, C: int, E: int) -> Tensor:
    """(N, C) distinct experts of each token."""
    return torch.rand(N, E, device=place.device).topk(C).indices


def permute_and_sort(place: Place, N: int, C: int, E: int, D: int) -> Made:
    """The whole operation: sorting the choices moves little and takes its time."""
    x, experts_NC = normal(place, N, D), choices(place, N, C, E)
    sides = ways(lambda backend: permute(x, experts_NC, E, backend), place.ours)
    sides["unfused"] = lambda: x.index_select(0, experts_NC.flatten().argsort(stable=True) // C)
    return Made(sides, sides["torch"], exact, bytes=2 * (N + N * C) * D)


def permute_only(place: Place, N: int, C: int, E: int, D: int) -> Made:
    """The kernel alone, sorted before; the naive way moves the same bytes."""
    x, experts_NC = normal(place, N, D), choices(place, N, C, E)
    order_S, ends_E, place_NC = sort_by_expert(experts_NC, E)
    token_S = order_S // C
    sides: dict[str, Run] = {
        "triton": lambda: x.index_select(0, token_S),
        "unfused": lambda: x.index_select(0, token_S),
    }
    if place.ours == "triton":
        sides["triton"] = lambda: torch.ops.lit_kernels.permute(x, place_NC, ends_E)
    return Made(sides, sides["unfused"], exact, bytes=2 * (N + N * C) * D)


def permute_backward(place: Place, N: int, C: int, E: int, D: int) -> Made:
    x, experts_NC, grad = normal(place, N, D).requires_grad_(), choices(place, N, C, E), normal(place, N * C, D)
    token_S = sort_by_expert(experts_NC, E)[0] // C
    sides = {
        "triton": backward(permute(x, experts_NC, E, place.ours).rows_SD, [x], grad),
        "torch": backward(permute(x, experts_NC, E, "torch").rows_SD, [x], grad),
        "unfused": lambda: grad.new_zeros(N, D).index_add_(0, token_S, grad),
    }
    return Made(sides, sides["torch"], bytes=2 * (N + N * C) * D)


def permute_and_quantise(place: Place, N: int, C: int, E: int, D: int) -> Made:
    """The kernel alone, sorted before. Unfused: rows moved, then quantised by ours."""
    x, experts_NC, ours = normal(place, N, D), choices(place, N, C, E), place.ours
    order_S, ends_E, place_NC = sort_by_expert(experts_NC, E)
    token_S = order_S // C
    sides: dict[str, Run] = {
        "triton": lambda: permute_quantised(x, experts_NC, E, backend=ours).rows,
        "unfused": lambda: quantise_rows(x.index_select(0, token_S), backend=ours),
    }
    if place.ours == "triton":
        sides["triton"] = lambda: torch.ops.lit_kernels.permute_quantised(x, place_NC, ends_E, "float")
    return Made(sides, sides["unfused"], exact, bytes=int(N * D * 2 + N * C * D * (1 + SCALE)))


def returning(place: Place, N: int, C: int, E: int, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (S, D), weights (N, C), the order of the choices (S,), the place of each (N, C)."""
    order_S, _, place_NC = sort_by_expert(choices(place, N, C, E), E)
    return normal(place, N * C, D), torch.rand(N, C, device=place.device), order_S, place_NC


def naive_unpermute(rows_SD: Tensor, weights_NC: Tensor, order_S: Tensor) -> Tensor:
    """As models have it: weighted, then added up by atomics."""
    N, C = weights_NC.shape
    weighted_SD = rows_SD * weights_NC.flatten()[order_S, None].to(rows_SD.dtype)
    return rows_SD.new_zeros(N, rows_SD.shape[1]).index_add(0, order_S // C, weighted_SD)


def unpermute_forward(place: Place, N: int, C: int, E: int, D: int) -> Made:
    rows, weights_NC, order_S, place_NC = returning(place, N, C, E, D)
    sides = ways(lambda backend: unpermute(rows, place_NC, weights_NC, backend), place.ours)
    sides["unfused"] = lambda: naive_unpermute(rows, weights_NC, order_S)
    return Made(sides, sides["torch"], bytes=2 * (N + N * C) * D)


def unpermute_backward(place: Place, N: int, C: int, E: int, D: int) -> Made:
    rows, weights_NC, order_S, place_NC = returning(place, N, C, E, D)
    inputs, grad = [rows.requires_grad_(), weights_NC.requires_grad_()], normal(place, N, D)
    results = {
        "triton": unpermute(rows, place_NC, weights_NC, place.ours),
        "torch": unpermute(rows, place_NC, weights_NC, "torch"),
        "unfused": naive_unpermute(rows, weights_NC, order_S),
    }
    sides = {name: backward(y, inputs, grad) for name, y in results.items()}
    return Made(sides, sides["torch"], bytes=2 * (N + 2 * N * C) * D)


def rows_and_columns(N: int, C: int, E: int, D: int) -> tuple[int, int]:
    """The shape as `dispatch` gets it."""
    return N * C, D


ROUTES = ((4096, 8, 256, 7168), (8192, 8, 128, 2048)), (), (16, 2, 4, 128)
GROUPS = {
    "permute": (
        Kind("sorting too", permute_and_sort, "permute", *ROUTES, rows_and_columns),
        Kind("fwd", permute_only, "", *ROUTES),
        Kind("bwd", permute_backward, "permute", *ROUTES, rows_and_columns),
        Kind("quantised", permute_and_quantise, "", *ROUTES),
    ),
    "unpermute": (
        Kind("fwd", unpermute_forward, "unpermute", *ROUTES, rows_and_columns),
        Kind("bwd", unpermute_backward, "unpermute", *ROUTES, rows_and_columns),
    ),
}
