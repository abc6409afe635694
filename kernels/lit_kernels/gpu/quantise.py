# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Triton kernels that quantise to E4M3 with block scales; `fp8.py` says what they compute, bit by bit.

Each reads a tile of 128 columns once. Divisions are the correctly rounded ones: the compiler's default is not, and then
a scale would differ from the reference's in its last bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.fp8 import BLOCK, E4M3, LARGEST, SMALLEST, Quantised, Scales
from lit_kernels.gpu import on_its_device

_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)
ROWS = 32  # of a tile whose rows have scales of their own


@triton.jit
def _scales(amax, POWER_OF_TWO: tl.constexpr):
    """See `fp8.scales_of`."""
    amax = tl.maximum(amax, _SMALLEST)
    scale = tl.div_rn(amax, _LARGEST)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        inverse = tl.where(exponent == 255, 0, (254 - exponent) << 23)
        return (exponent << 23).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
    return scale, tl.div_rn(tl.full(amax.shape, _LARGEST, tl.float32), amax)


@triton.jit
def _rows(x, values, scales, M, K, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (m[:, None] < M) & (k[None, :] < K)
    tile = tl.load(x + m[:, None] * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale, inverse = _scales(tl.max(tl.abs(tile), 1), POWER_OF_TWO)
    tl.store(values + m[:, None] * K + k[None, :], (tile * inverse[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + tl.program_id(1).to(tl.int64) * M + m, scale, mask=m < M)


@triton.jit
def _blocks(
    w, values, scales, N, K, stride_w, SIDE: tl.constexpr, POWER_OF_TWO: tl.constexpr, TRANSPOSED: tl.constexpr
):
    e = tl.program_id(2).to(tl.int64)  # the matrix, of several that lie one behind the other
    w, values, scales = w + e * N * stride_w, values + e * N * K, scales + e * tl.num_programs(0) * tl.num_programs(1)
    n = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    k = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (n[:, None] < N) & (k[None, :] < K)
    tile = tl.load(w + n[:, None] * stride_w + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale, inverse = _scales(tl.max(tl.max(tl.abs(tile), 1), 0), POWER_OF_TWO)
    quantised = (tile * inverse).to(tl.float8e4nv)
    if TRANSPOSED:
        inside = (k[:, None] < K) & (n[None, :] < N)
        tl.store(values + k[:, None].to(tl.int64) * N + n[None, :], tl.trans(quantised), mask=inside)
        tl.store(scales + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), scale)
    else:
        tl.store(values + n[:, None] * K + k[None, :], quantised, mask=inside)
        tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def _both(x, values, scales, values_t, scales_t, M, K, stride_x, SIDE: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    k = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (m[:, None] < M) & (k[None, :] < K)
    tile = tl.load(x + m[:, None] * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(tile)
    scale, inverse = _scales(tl.max(size, 1), POWER_OF_TWO)
    tl.store(values + m[:, None] * K + k[None, :], (tile * inverse[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + tl.program_id(1).to(tl.int64) * M + m, scale, mask=m < M)
    scale, inverse = _scales(tl.max(size, 0), POWER_OF_TWO)
    turned = tl.trans((tile * inverse[None, :]).to(tl.float8e4nv))
    tl.store(values_t + k[:, None] * M + m[None, :], turned, mask=(k[:, None] < K) & (m[None, :] < M))
    tl.store(scales_t + tl.program_id(0).to(tl.int64) * K + k, scale, mask=k < K)


@on_its_device
def quantise_rows(x_MK: Tensor, kind: Scales = "float") -> Quantised:
    """See `fp8.quantise_rows_reference`; x's last dimension must be contiguous."""
    M, K = _checked(x_MK)
    values, scales_kM = _empty(x_MK, M, K), x_MK.new_empty(triton.cdiv(K, BLOCK), M, dtype=torch.float32)
    if x_MK.numel():
        grid = (triton.cdiv(M, ROWS), len(scales_kM))
        _rows[grid](x_MK, values, scales_kM, M, K, x_MK.stride(0), ROWS, BLOCK, kind == "power of two")
    return Quantised(values, scales_kM.t())


@on_its_device
def quantise_blocks(w_NK: Tensor, kind: Scales = "float", transposed: bool = False) -> Quantised:
    """See `fp8.quantise_blocks_reference`, of w or of its transpose; w's last dimension must be contiguous."""
    N, K = _checked(w_NK)
    grid = (triton.cdiv(N, BLOCK), triton.cdiv(K, BLOCK))
    values = _empty(w_NK, K, N) if transposed else _empty(w_NK, N, K)
    scales = w_NK.new_empty(grid[::-1] if transposed else grid, dtype=torch.float32)
    if w_NK.numel():
        constants = (BLOCK, kind == "power of two", transposed)
        _blocks[grid](w_NK, values, scales, N, K, w_NK.stride(0), *constants, num_warps=8)
    return Quantised(values, scales)


@on_its_device
def quantise_both(x_MK: Tensor, kind: Scales = "float") -> tuple[Quantised, Quantised]:
    """See `fp8.quantise_both_reference`; x's last dimension must be contiguous."""
    M, K = _checked(x_MK)
    grid = (triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK))
    values, values_t = _empty(x_MK, M, K), _empty(x_MK, K, M)
    scales_kM, scales_mK = (x_MK.new_empty(shape, dtype=torch.float32) for shape in ((grid[1], M), (grid[0], K)))
    if x_MK.numel():
        outputs = (values, scales_kM, values_t, scales_mK)
        _both[grid](x_MK, *outputs, M, K, x_MK.stride(0), BLOCK, kind == "power of two", num_warps=8)
    return Quantised(values, scales_kM.t()), Quantised(values_t, scales_mK.t())


def _checked(x: Tensor) -> tuple[int, int]:
    if x.dim() != 2 or x.stride(1) != 1 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"got a {x.dtype} tensor of shape {tuple(x.shape)} and strides {x.stride()}; valid: two dimensions, the "
            "last one contiguous, of bfloat16, float16 or float32. Type x.reshape(-1, x.shape[-1]).contiguous()"
        )
    return x.shape[0], x.shape[1]


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, columns, dtype=E4M3)
