"""Cases whose bound is the memory's bandwidth: quantising, SwiGLU, RMSNorm. See kernels_measure.py.

Bytes are counted once per number read and written: bfloat16 2, E4M3 1, a float32 scale 4 per 128 numbers.

Shapes: M rows, K or D columns, N rows of a weight, W columns of a gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench.kernels_compare import exact
from bench.kernels_measure import Kind, Made, Place, Run, ways
from lit_kernels.fp8 import quantise_blocks_reference, quantise_both_reference, quantise_rows_reference
from lit_kernels.quantise import quantise_blocks, quantise_both, quantise_rows
from lit_kernels.rms_norm import rms_norm, rms_norm_quantised
from lit_kernels.swiglu import silu_mul, silu_mul_quantised
from torch import Tensor

SCALE = 4 / 128  # bytes per number that has one


def normal(place: Place, *shape: int) -> Tensor:
    return torch.randn(shape, device=place.device, dtype=torch.bfloat16)


def backward(y: Tensor, inputs: list[Tensor], grad: Tensor) -> Run:
    """What runs backward, as often as asked."""
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def of_rows(place: Place, M: int, K: int) -> Made:
    x = normal(place, M, K)
    sides = ways(lambda backend: quantise_rows(x, backend=backend), place.ours)
    return Made(sides, lambda: quantise_rows_reference(x), exact, bytes=int(M * K * (2 + 1 + SCALE)))


def of_blocks(place: Place, N: int, K: int) -> Made:
    w = normal(place, N, K)
    sides = ways(lambda backend: quantise_blocks(w, backend=backend), place.ours)
    return Made(sides, lambda: quantise_blocks_reference(w), exact, bytes=N * K * (2 + 1))


def of_both(place: Place, M: int, K: int) -> Made:
    """The two kernels: rows, and blocks of the transpose, as many bytes as rows of it would be."""
    x = normal(place, M, K)

    def two_kernels():
        return quantise_rows(x, backend=place.ours), quantise_blocks(x, backend=place.ours, transposed=True)

    def with_a_transposed_copy():
        return tuple(quantise_rows(one.contiguous(), backend=place.ours) for one in (x, x.t()))

    sides = ways(lambda backend: quantise_both(x, backend=backend), place.ours)
    sides |= {"two kernels": two_kernels, "with a transposed copy": with_a_transposed_copy}
    return Made(sides, lambda: quantise_both_reference(x), exact, bytes=int(M * K * (2 + 2 * (1 + SCALE))))


def naive_silu_mul(gate_up: Tensor) -> Tensor:
    """As models have it: two kernels."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_forward(place: Place, M: int, W: int) -> Made:
    x = normal(place, M, 2 * W)
    sides = ways(lambda backend: silu_mul(x, backend), place.ours) | {"unfused": lambda: naive_silu_mul(x)}
    return Made(sides, sides["torch"], bytes=6 * M * W)


def swiglu_backward(place: Place, M: int, W: int) -> Made:
    x, grad = normal(place, M, 2 * W).requires_grad_(), normal(place, M, W)
    results = {"triton": silu_mul(x, place.ours), "torch": silu_mul(x, "torch"), "unfused": naive_silu_mul(x)}
    sides = {name: backward(y, [x], grad) for name, y in results.items()}
    return Made(sides, sides["torch"], bytes=10 * M * W)


def swiglu_quantised(place: Place, M: int, W: int) -> Made:
    """Unfused: ours, one after the other."""
    x, ours = normal(place, M, 2 * W), place.ours
    sides: dict[str, Run] = {
        "triton": lambda: silu_mul_quantised(x, backend=ours),
        "unfused": lambda: quantise_rows(silu_mul(x, ours), backend=ours),
        "silu, product, quantised": lambda: quantise_rows(naive_silu_mul(x), backend=ours),
    }
    return Made(sides, sides["unfused"], exact, bytes=int(M * W * (4 + 1 + SCALE)))


def norms(place: Place, x: Tensor, gain: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's own fused kernel is a rival, too."""
    sides = ways(lambda backend: rms_norm(x, gain, backend=backend), place.ours)
    return sides | {"F.rms_norm": lambda: F.rms_norm(x, gain.shape, gain, 1e-6)}


def norm_forward(place: Place, M: int, D: int) -> Made:
    sides = norms(place, normal(place, M, D), normal(place, D))
    return Made(sides, sides["torch"], bytes=4 * M * D)


def norm_backward(place: Place, M: int, D: int) -> Made:
    x, gain, grad = normal(place, M, D).requires_grad_(), normal(place, D).requires_grad_(), normal(place, M, D)
    sides = {name: backward(run(), [x, gain], grad) for name, run in norms(place, x, gain).items()}
    return Made(sides, sides["torch"], bytes=6 * M * D)


def norm_quantised(place: Place, M: int, D: int) -> Made:
    x, gain, ours = normal(place, M, D), normal(place, D), place.ours
    sides: dict[str, Run] = {
        "triton": lambda: rms_norm_quantised(x, gain, backend=ours),
        "unfused": lambda: quantise_rows(rms_norm(x, gain, backend=ours), backend=ours),
    }
    return Made(sides, sides["unfused"], exact, bytes=int(M * D * (2 + 1 + SCALE)))


# Shapes that targets judge, others, and one for --dry-run. The first are several times the L2 cache (50 MB).
TOKENS = ((32768, 7168),), ((4096, 7168), (4096, 2048)), (96, 256)
WEIGHTS = ((36864, 7168),), ((4096, 7168), (2048, 1408)), (96, 256)
GATES = ((32768, 2048), (8192, 18432)), ((4096, 2048), (65536, 768)), (32, 256)
NORMS = ((32768, 7168), (32768, 2048)), ((4096, 7168),), (32, 256)
GROUPS = {
    "quantise": (
        Kind("rows", of_rows, "quantise_rows", *TOKENS),
        Kind("blocks", of_blocks, "quantise_blocks", *WEIGHTS),
        Kind("both", of_both, "quantise_both", *TOKENS),
    ),
    "swiglu": (
        Kind("fwd", swiglu_forward, "silu_mul", *GATES),
        Kind("bwd", swiglu_backward, "silu_mul", *GATES),
        Kind("quantised", swiglu_quantised, "", *GATES),
    ),
    "rms_norm": (
        Kind("fwd", norm_forward, "rms_norm", *NORMS),
        Kind("bwd", norm_backward, "rms_norm", *NORMS),
        Kind("quantised", norm_quantised, "", *NORMS),
    ),
}
