"""Cases of experts: products of rows sorted by expert, in FP8 and bf16, and whole layers. See kernels_measure.py.

Shapes: E experts, m rows of each (jagged: 0.7 m to 1.3 m, and one expert without), S rows; N outputs, K inputs of an
expert. Layers: T tokens, C choices of each, D width, W expert width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench.kernels_compare import exact
from bench.kernels_measure import Kind, Made, Place, Run, ways
from bench.kernels_routes import choices
from bench.kernels_streams import SCALE, backward, normal
from lit_kernels.grouped import experts, experts_reference, grouped_mm
from lit_kernels.grouped_fp8 import fp8_grouped_mm, quantise_by_expert_reference
from torch import Tensor

OPS = torch.ops.lit_kernels
BF16 = torch.bfloat16


class Problem(NamedTuple):
    """x (S, K), w (E, N, K), the gradient of y = x w_e^T (S, N), and where each expert's rows end."""

    x: Tensor
    w: Tensor
    grad: Tensor
    ends: Tensor
    flops: int


def problem(place: Place, E: int, m: int, N: int, K: int, jagged: bool = False) -> Problem:
    counts_E = torch.full((E,), m)
    if jagged:
        counts_E = (torch.empty(E).uniform_(0.7, 1.3) * m).long()
        counts_E[1] = 0
    S = int(counts_E.sum())
    ends = counts_E.cumsum(0).to(device=place.device, dtype=torch.int32)
    return Problem(normal(place, S, K), normal(place, E, N, K), normal(place, S, N), ends, 2 * S * N * K)


def of_weights(p: Problem) -> Tensor:
    """The bf16 product; torch leaves what belongs to an expert without rows unwritten."""
    dw = F.grouped_mm(p.grad.t(), p.x, offs=p.ends)
    return dw.masked_fill_((p.ends.diff(prepend=p.ends.new_zeros(1)) == 0)[:, None, None], 0)


def loop(x: Tensor, w: Tensor, ends: Tensor) -> Run:
    """A product per expert, which knows before where rows end."""
    spans = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))
    return lambda: torch.cat([x[start:end] @ w[e].t() for e, (start, end) in enumerate(spans)])


def forward_fp8(place: Place, *shape: int, jagged: bool = False) -> Made:
    """The product alone, quantised before; so are the next two."""
    p = problem(place, *shape, jagged=jagged)
    a = OPS.quantise_by_expert(p.x, p.ends, "float", place.ours)[:2]
    b = OPS.quantise_experts(p.w, "float", False, place.ours)
    sides = ways(lambda backend: OPS.fp8_grouped_gemm(*a, *b, p.ends, BF16, backend), place.product)
    sides["F.grouped_mm"] = lambda: F.grouped_mm(p.x, p.w.transpose(1, 2), offs=p.ends)
    return Made(sides, sides["F.grouped_mm"], flops=p.flops)


def input_gradient_fp8(place: Place, *shape: int, jagged: bool = False) -> Made:
    p = problem(place, *shape, jagged=jagged)
    a = OPS.quantise_by_expert(p.grad, p.ends, "float", place.ours)[:2]
    b = OPS.quantise_experts(p.w, "float", True, place.ours)
    sides = ways(lambda backend: OPS.fp8_grouped_gemm(*a, *b, p.ends, BF16, backend), place.product)
    sides["F.grouped_mm"] = lambda: F.grouped_mm(p.grad, p.w, offs=p.ends)
    return Made(sides, sides["F.grouped_mm"], flops=p.flops)


def weight_gradient_fp8(place: Place, *shape: int, jagged: bool = False) -> Made:
    p = problem(place, *shape, jagged=jagged)
    a, b = (OPS.quantise_by_expert(x, p.ends, "float", place.ours)[2:] for x in (p.grad, p.x))
    sides = ways(
        lambda backend: OPS.fp8_grouped_gemm_weights(*a, *b, p.ends, len(p.x), BF16, backend), place.product
    )  # fmt: skip
    sides["F.grouped_mm"] = lambda: F.grouped_mm(p.grad.t(), p.x, offs=p.ends)
    return Made(sides, lambda: of_weights(p), flops=p.flops)


def quantising(place: Place, E: int, m: int, N: int, K: int) -> Made:
    """Rows, and columns by expert, from one read."""
    p = problem(place, E, m, N, K)
    sides = ways(lambda backend: OPS.quantise_by_expert(p.x, p.ends, "float", backend), place.ours)
    moved = int(p.x.numel() * (2 + 2 * (1 + SCALE)))
    return Made(sides, lambda: quantise_by_expert_reference(p.x, p.ends), exact, bytes=moved)


def trained(run: Run, p: Problem) -> Run:
    return lambda: torch.autograd.grad(run(), [p.x, p.w], p.grad)


def training_fp8(place: Place, E: int, m: int, N: int, K: int) -> Made:
    """With quantising, forward and both gradients."""
    p = problem(place, E, m, N, K)
    p.x.requires_grad_()
    p.w.requires_grad_()
    sides: dict[str, Run] = {
        "triton": trained(lambda: fp8_grouped_mm(p.x, p.w, p.ends, backend=place.product), p),
        "torch": trained(lambda: fp8_grouped_mm(p.x, p.w, p.ends, backend="torch"), p),
        "bf16": trained(lambda: grouped_mm(p.x, p.w, p.ends), p),
    }
    return Made(sides, sides["bf16"], flops=3 * p.flops)


def forward_bf16(place: Place, *shape: int, jagged: bool = False) -> Made:
    p = problem(place, *shape, jagged=jagged)
    sides = ways(lambda backend: grouped_mm(p.x, p.w, p.ends, backend=backend), place.ours)
    sides["F.grouped_mm"] = lambda: F.grouped_mm(p.x, p.w.transpose(1, 2), offs=p.ends)
    sides["loop"] = loop(p.x, p.w, p.ends)
    return Made(sides, sides["F.grouped_mm"], flops=p.flops)


def backward_bf16(place: Place, *shape: int, jagged: bool = False) -> Made:
    p = problem(place, *shape, jagged=jagged)
    inputs = [p.x.requires_grad_(), p.w.requires_grad_()]
    sides = {
        name: backward(grouped_mm(p.x, p.w, p.ends, backend=backend), inputs, p.grad)
        for name, backend in (("triton", place.ours), ("torch", "torch"))
    }
    return Made(sides, sides["torch"], flops=2 * p.flops)


def jagged(make: Callable[..., Made]) -> Callable[..., Made]:
    return lambda place, *shape: make(place, *shape, jagged=True)


def as_dispatched(E: int, m: int, N: int, K: int) -> tuple[int, ...]:
    return E, E * m, N, K


def layer(place: Place, T: int, C: int, E: int, D: int, W: int) -> list[Tensor]:
    """What `experts` takes."""
    weights_TC = torch.rand(T, C, device=place.device).softmax(-1)
    gate_up, down = normal(place, E, 2 * W, D) / D**0.5, normal(place, E, D, W) / W**0.5
    return [normal(place, T, D), choices(place, T, C, E), weights_TC, gate_up, down]


def whole_layer(place: Place, *shape: int) -> Made:
    """Forward and backward, quantising and routing included. "auto" goes by the dispatch table of before."""
    given = layer(place, *shape)
    inputs, grad = [x.requires_grad_() for x in given if x.is_floating_point()], torch.randn_like(given[0])

    def side(backend: str, precision: str) -> Run:
        return lambda: torch.autograd.grad(experts(*given, backend=backend, precision=precision), inputs, grad)  # type: ignore[misc]

    sides = {
        "triton": side(place.product, "fp8"),
        "bf16": side("auto", "bf16"),
        "bf16 by ours": side(place.ours, "bf16"),
    }
    return Made(sides, sides["bf16"], flops=18 * shape[0] * shape[1] * shape[3] * shape[4])


def against_a_loop(place: Place, *shape: int) -> Made:
    """The forward of a whole layer; the loop looks for each expert's tokens, as models do."""
    given: list[Any] = layer(place, *shape)
    sides: dict[str, Run] = {
        "triton": lambda: experts(*given, backend=place.product, precision="fp8"),
        "bf16": lambda: experts(*given),
        "loop": lambda: experts_reference(*given),
    }
    return Made(sides, sides["loop"], flops=6 * shape[0] * shape[1] * shape[3] * shape[4])


BIG = tuple((E, m, N, K) for E, m in ((8, 4096), (32, 1024), (256, 128)) for N, K in ((4096, 7168), (7168, 2048)))
CONTROLS = ((64, 384, 2816, 2048), (128, 512, 1536, 2048))  # gates and ups of 2048 x 1408 and 2048 x 768
TINY = (4, 32, 64, 128)
PLAIN, JAGGED = (BIG, CONTROLS, TINY), (((8, 4096, 4096, 7168), (32, 1024, 7168, 2048)), (), TINY)
GROUPS = {
    "grouped_fp8": (
        Kind("fwd", forward_fp8, "", *PLAIN),
        Kind("dgrad", input_gradient_fp8, "", *PLAIN),
        Kind("wgrad", weight_gradient_fp8, "", *PLAIN),
        Kind("fwd jagged", jagged(forward_fp8), "", *JAGGED),
        Kind("dgrad jagged", jagged(input_gradient_fp8), "", *JAGGED),
        Kind("wgrad jagged", jagged(weight_gradient_fp8), "", *JAGGED),
        Kind("quantising", quantising, "", ((8, 4096, 4096, 7168), (256, 128, 4096, 7168)), (), TINY),
        Kind("fwd+bwd", training_fp8, "fp8_grouped_mm", *PLAIN, as_dispatched),
    ),
    "grouped_bf16": (
        Kind("fwd", forward_bf16, "grouped_mm", *PLAIN, as_dispatched),
        Kind("bwd", backward_bf16, "grouped_mm", *PLAIN, as_dispatched),
        Kind("fwd jagged", jagged(forward_bf16), "", *JAGGED),
        Kind("bwd jagged", jagged(backward_bf16), "", *JAGGED),
    ),
    "moe": (
        Kind("fwd+bwd", whole_layer, "", ((4096, 8, 8, 7168, 2048),),
             ((4096, 8, 32, 7168, 2048), (4096, 6, 64, 2048, 1408), (8192, 8, 128, 2048, 768)), (16, 2, 4, 64, 128)),
        Kind("against a loop", against_a_loop, "", ((8192, 8, 128, 2048, 768),), (), (16, 2, 4, 64, 128)),
    ),
}  # fmt: skip
