"""The product of two E4M3 matrices with block scales, a b^T, its sums promoted to float32 every 128 terms (2412.19437
section 3.3.2).

    torch      cuBLASLt by `F.scaled_mm`: Hopper and CUDA 12.9 or newer
    triton     ours: GPUs with FP8 tensor cores (8.9 and above)
    emulate    dequantised and multiplied in float32, on any device: the numbers without the speed
    auto       torch or triton, never emulated

Name and shape for `dispatch`: "fp8_gemm", (M, N, K). No gradient: see `linear.py`.

Shapes: M rows of a, N rows of b, K summed; k, n: blocks of 128 of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from lit_kernels.dispatch import UnsupportedError, choose, missing_for_triton_fp8
from lit_kernels.fp8 import BLOCK, Quantised, gemm_reference

ALIGNED = 16  # numbers: cuBLASLt takes no other K or N


def gemm(a: Quantised, b: Quantised, dtype: torch.dtype = torch.bfloat16, backend: str = "auto") -> Tensor:
    """a b^T (M, N) of rows `a` (M, K) and rows or blocks `b` (N, K), rounded once to `dtype`.

    Raises:
        UnsupportedError: the implementation asked for, or with "auto" any, cannot run this case.
        ValueError: the shapes do not fit, or there is no such backend.

    Example::

        y = gemm(quantise_rows(x), quantise_blocks(weight))
    """
    (M, K), N = a.values.shape, len(b.values)
    in_blocks = is_in_blocks(a, b)
    if backend != "emulate":
        backend = _chosen(backend, a.values.device, (M, N, K))
    return _gemm(*a, *b, dtype, in_blocks, backend)


def check_product(backend: str, device: torch.device) -> None:
    """Raises what `gemm` would raise there of a product of any fitting shape."""
    if backend != "emulate":
        _chosen(backend, device, (BLOCK, BLOCK, BLOCK))


def is_in_blocks(a: Quantised, b: Quantised) -> bool:
    """Whether `b` has scales of blocks, not of rows.

    Raises:
        ValueError: the shapes are not those of a product.
    """
    (M, K), N = a.values.shape, len(b.values)
    k = -(-K // BLOCK)
    in_blocks = b.scales.shape != (N, k)
    fits = not in_blocks or b.scales.shape == (-(-N // BLOCK), k)
    if b.values.shape[1] != K or a.scales.shape != (M, k) or not fits:
        raise ValueError(
            f"got a {tuple(a.values.shape)} with scales {tuple(a.scales.shape)} and b {tuple(b.values.shape)} with "
            f"scales {tuple(b.scales.shape)}; valid: (M, K) with (M, k), (N, K) with (N, k) or (n, k), for k = K / 128"
        )
    return in_blocks


def missing_for_torch(device: torch.device, N: int, K: int) -> str:
    """Why `F.scaled_mm` has no product with block scales there; empty if it has."""
    if device.type != "cuda":
        return f"torch has no product with block scales on a {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"torch has block scales for compute capability 9.0, not {major}.{minor}"
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if version < (12, 9):
        return f"block scales need CUDA 12.9, this torch was built with {torch.version.cuda}"
    if N % ALIGNED or K % ALIGNED:
        return f"N={N} or K={K} is no multiple of {ALIGNED}"
    return ""


def _chosen(backend: str, device: torch.device, shape: tuple[int, int, int]) -> str:
    """ "torch" or "triton"; see `gemm`."""
    without_torch, without_triton = missing_for_torch(device, *shape[1:]), missing_for_triton_fp8(device)
    choice = choose("fp8_gemm", backend, device, shape)
    if backend == "auto":
        choice = choice if choice.backend == "triton" or not without_torch else choice._replace(backend="triton")
        if choice.backend == "triton" and (without_triton or device.type != "cuda"):
            reasons = " and ".join(filter(None, (without_torch, without_triton)))
            raise UnsupportedError(f"fp8_gemm cannot run: {reasons}. Type backend='emulate' for its numbers")
    elif reason := {"torch": without_torch, "triton": without_triton}[choice.backend]:
        raise UnsupportedError(f"fp8_gemm got backend={backend!r}, but {reason}. Type backend='auto' or 'emulate'")
    return choice.backend


@torch.library.custom_op("lit_kernels::fp8_gemm", mutates_args=())
def _gemm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, in_blocks: bool, backend: str
) -> Tensor:
    if backend == "torch":
        return _by_cublas(a, a_scales, b, b_scales, dtype, in_blocks)
    if backend == "emulate":
        return _emulated(Quantised(a, a_scales), Quantised(b, b_scales), dtype)
    from lit_kernels.gpu import gemm

    return gemm.gemm(Quantised(a, a_scales), Quantised(b, b_scales), dtype)


@_gemm.register_fake
def _(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, in_blocks: bool, backend: str
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _emulated(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """With scales that are powers of two the operands have 4 bits: bfloat16 holds them, and a CPU with products of
    bfloat16 summed in float32 gives what the float32 product does, to the order of its sums, in a third of the time."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, on_cpu = settings.fp32_precision, a.values.device.type == "cpu"  # elsewhere the question would wait
    try:
        if on_cpu and _are_powers_of_two(a.scales) and _are_powers_of_two(b.scales):
            settings.fp32_precision = "bf16"
        with torch.autocast(a.values.device.type, enabled=False):
            return gemm_reference(a, b, dtype)
    finally:
        settings.fp32_precision = before


def _are_powers_of_two(scales: Tensor) -> bool:
    return not bool((scales.contiguous().view(torch.int32) & 0x7FFFFF).any())


def _by_cublas(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype, in_blocks: bool) -> Tensor:
    """Layouts as in torch/_meta_registrations.py (2.13) and ATen's ScaledBlas.cpp: scales of rows (M, k) with strides
    (1, M); those of blocks transposed, (k', n) with strides (1, k'), where k' is k rounded up to a multiple of 4."""
    M = a.shape[0]
    if not (M and a.shape[1]):
        return a.new_zeros(M, b.shape[0], dtype=dtype)
    if more := -M % ALIGNED:  # cuBLASLt wants a multiple of 8 rows where their scales are 1 x 128
        a, a_scales = (F.pad(x.view(torch.uint8) if x is a else x, (0, 0, 0, more)) for x in (a, a_scales))
        a = a.view(b.dtype)
    recipe = ScalingType.BlockWise128x128 if in_blocks else ScalingType.BlockWise1x128
    b_scales = F.pad(b_scales, (0, -b_scales.shape[1] % 4)).t() if in_blocks else _by_column(b_scales)
    rows = ScalingType.BlockWise1x128
    return F.scaled_mm(a, b.t(), _by_column(a_scales), rows, b_scales, recipe, output_dtype=dtype).narrow(0, 0, M)


def _by_column(scales: Tensor) -> Tensor:
    return scales.t().contiguous().t()
