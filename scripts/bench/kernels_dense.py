"""Cases of dense products: what the GPU can do at most, FP8 products with block scales, whole linear layers. See
kernels_measure.py.

Shapes: M rows (tokens), N outputs, K inputs of a layer; a product is (M, N, K) of a b^T with K summed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench.kernels_measure import Kind, Made, Place, Run
from bench.kernels_streams import normal
from lit_kernels.fp8 import E4M3, Quantised
from lit_kernels.gemm import gemm
from lit_kernels.linear import fp8_linear
from lit_kernels.quantise import quantise_blocks, quantise_rows
from torch import Tensor
from torch.nn.functional import ScalingType


def cublas(a: Quantised, b: Quantised, in_blocks: bool) -> Run:
    """`F.scaled_mm` alone: its scales are laid out before. See `lit_kernels.gemm` for the layouts."""
    a_scales, rows = a.scales.t().contiguous().t(), ScalingType.BlockWise1x128
    b_scales, recipe = b.scales.t().contiguous().t(), rows
    if in_blocks:
        b_scales, recipe = F.pad(b.scales, (0, -b.scales.shape[1] % 4)).t(), ScalingType.BlockWise128x128
    return lambda: F.scaled_mm(
        a.values, b.values.t(), a_scales, rows, b_scales, recipe, output_dtype=torch.bfloat16
    )  # fmt: skip


def operands(place: Place, M: int, N: int, K: int, in_blocks: bool) -> tuple[Tensor, Tensor, Quantised, Quantised]:
    """x (M, K), w (N, K), and both in FP8."""
    x, w = normal(place, M, K), normal(place, N, K)
    return (
        x,
        w,
        quantise_rows(x, backend="torch"),
        (quantise_blocks if in_blocks else quantise_rows)(w, backend="torch"),
    )


def product(place: Place, M: int, N: int, K: int, in_blocks: bool) -> Made:
    """Quantised before. Its reference is the product in bf16."""
    x, w, a, b = operands(place, M, N, K, in_blocks)
    sides: dict[str, Run] = {
        "triton": lambda: gemm(a, b, backend=place.product),
        "torch": lambda: gemm(a, b, backend="torch"),
        "F.scaled_mm": cublas(a, b, in_blocks),
        "torch.mm": lambda: torch.mm(x, w.t()),
    }
    return Made(sides, sides["torch.mm"], flops=2 * M * N * K)


def forward(place: Place, M: int, N: int, K: int) -> Made:
    return product(place, M, N, K, in_blocks=True)


def input_gradient(place: Place, M: int, N: int, K: int) -> Made:
    """(M, N) x (K, N)^T."""
    return product(place, M, K, N, in_blocks=True)


def weight_gradient(place: Place, M: int, N: int, K: int) -> Made:
    """(N, M) x (K, M)^T, both with a scale per 128 tokens."""
    return product(place, N, K, M, in_blocks=False)


def one_form(form: str, in_blocks: bool) -> Callable[..., Made]:
    """Of our kernel, each a case of its own, against the bf16 product."""

    def make(place: Place, M: int, N: int, K: int) -> Made:
        x, w, a, b = operands(place, M, N, K, in_blocks)
        sides: dict[str, Run] = {
            "triton": lambda: gemm(a, b, backend="emulate"),
            "torch.mm": lambda: torch.mm(x, w.t()),
        }
        if place.product == "triton":
            from lit_kernels.gpu import gemm as kernels

            sides["triton"] = lambda: kernels.gemm(a, b, form=form)  # type: ignore[arg-type]
        return Made(sides, sides["torch.mm"], flops=2 * M * N * K)

    return make


def layer(place: Place, M: int, N: int, K: int) -> Made:
    """Forward and backward of a linear layer, quantising included. "auto" goes by the dispatch table of before."""
    x, w, grad = normal(place, M, K).requires_grad_(), normal(place, N, K).requires_grad_(), normal(place, M, N)

    def trained(run: Run) -> Run:
        return lambda: torch.autograd.grad(run(), [x, w], grad)

    sides: dict[str, Run] = {
        "triton": trained(lambda: fp8_linear(x, w, backend=place.product)),
        "auto": trained(lambda: fp8_linear(x, w)),
        "bf16": trained(lambda: F.linear(x, w)),
    }
    return Made(sides, sides["bf16"], flops=6 * M * N * K)


def copy(place: Place) -> Made:
    """Of 1 GiB: every case that counts bytes has it as a side."""
    return Made({}, bytes=1)


def multiply(place: Place, M: int, N: int, K: int) -> Made:
    """The best that libraries do: FP8 with block scales, with one scale each (fast sums), bf16."""
    x, w = normal(place, M, K), normal(place, N, K)
    a, b = quantise_rows(x, backend="torch"), quantise_blocks(w, backend="torch")
    one, whole = torch.ones((), device=place.device), ScalingType.TensorWise
    x8, w8 = x.to(E4M3), w.to(E4M3)

    def tensor_wise() -> Tensor:
        return F.scaled_mm(x8, w8.t(), one, whole, one, whole, output_dtype=torch.bfloat16, use_fast_accum=True)

    sides: dict[str, Run] = {
        "FP8, block scales": cublas(a, b, in_blocks=True),
        "FP8, one scale": tensor_wise,
        "bf16": lambda: torch.mm(x, w.t()),
    }
    return Made(sides, flops=2 * M * N * K)


LAYERS = (
    (4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384),
    (4096, 4096, 7168), (4096, 7168, 2048), (4096, 36864, 7168), (4096, 7168, 18432),
)  # fmt: skip
SMALL = ((4096, 1408, 2048), (4096, 768, 2048))  # where FP8 is expected to lose
TINY = (32, 64, 256)
GROUPS = {
    "ceilings": (
        Kind("copy", copy, "", ((),), (), ()),
        Kind("product", multiply, "", ((8192, 8192, 8192), (16640, 8192, 5120), (4096, 7168, 16384)), (), TINY),
    ),
    "dense": (
        Kind("fwd", forward, "fp8_gemm", LAYERS, SMALL, TINY),
        Kind("dgrad", input_gradient, "fp8_gemm", LAYERS, SMALL, TINY, lambda M, N, K: (M, K, N)),
        Kind("wgrad", weight_gradient, "fp8_gemm", LAYERS, SMALL, TINY, lambda M, N, K: (N, K, M)),
    ),
    "linear": (Kind("fwd+bwd", layer, "", LAYERS, SMALL, TINY),),
    "forms": tuple(
        Kind(f"{form}, {name}", one_form(form, name == "blocks"), "", ((4096, 4096, 7168),), (), TINY)
        for form in ("pointers", "descriptors", "specialised")
        for name in ("blocks", "rows")
    ),
}
