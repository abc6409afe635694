# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Triton kernels of RMSNorm; `rms_norm.py` says what they compute.

A program keeps whole rows in registers and reads them once; the backward finds the root again instead of reading it.
The gradient of the gain sums over rows: each program over its own, torch over the programs, so that the order is fixed.

Shapes: M rows, D columns, P programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.fp8 import BLOCK, E4M3
from lit_kernels.gpu import on_its_device
from lit_kernels.gpu.quantise import _scales

TILE = 4096  # numbers of a program, where a row has fewer: 32 for each thread of 4 warps
TILE_BACKWARD = 2048  # 16 for each thread, which keeps three such tiles
PROGRAMS = 264  # of a backward: two for each multiprocessor of an H100


@triton.jit
def _normal(x, m, d, inside, D, eps):
    """x / sqrt(mean(x^2) + eps) and that factor, in float32."""
    tile = tl.load(x + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(tile * tile, 1) / D + eps)
    return tl.where(inside, tile * factor[:, None], 0.0), factor  # 0 * infinity, of a row that is not there and eps 0


@triton.jit
def _forward(x, gain, out, M, D, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    inside = (m[:, None] < M) & (d[None, :] < D)
    normal, _ = _normal(x, m, d, inside, D, eps)
    normal *= tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * D + d[None, :], normal.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantised(
    x, gain, values, scales, M, D, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    inside = (m[:, None] < M) & (d[None, :] < D)
    normal, _ = _normal(x, m, d, inside, D, eps)
    normal *= tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    rounded = normal.to(x.dtype.element_ty).to(tl.float32)
    blocks = tl.reshape(rounded, (ROWS, COLUMNS // BLOCK, BLOCK))
    scale, inverse = _scales(tl.max(tl.abs(blocks), 2), POWER_OF_TWO)
    values_ = tl.reshape((blocks * inverse[:, :, None]).to(tl.float8e4nv), (ROWS, COLUMNS))
    tl.store(values + m[:, None] * D + d[None, :], values_, mask=inside)
    block = tl.arange(0, COLUMNS // BLOCK).to(tl.int64)
    there = (m[:, None] < M) & (block[None, :] < tl.cdiv(D, BLOCK))
    tl.store(scales + block[None, :] * M + m[:, None], scale, mask=there)


@triton.jit
def _backward(grad, x, gain, out, sums, M, D, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    d = tl.arange(0, COLUMNS)
    gain_ = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Stages: the next rows are on their way, into shared memory, while these are summed.
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=3):
        m = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (m[:, None] < M) & (d[None, :] < D)
        grad_ = tl.load(grad + m[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        normal, factor = _normal(x, m, d, inside, D, eps)
        total += grad_ * normal
        grad_ *= gain_[None, :]
        along = tl.sum(grad_ * normal, 1) / D
        grad_x = (grad_ - normal * along[:, None]) * factor[:, None]
        tl.store(out + m[:, None] * D + d[None, :], grad_x.to(out.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, 0), mask=d < D)


@on_its_device
def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """(M, D)."""
    M, D = x_MD.shape
    out = x_MD.new_empty(M, D)
    if out.numel():
        rows, columns, num_warps = _tile(D)
        grid = (triton.cdiv(M, rows),)
        _forward[grid](x_MD.contiguous(), gain_D.contiguous(), out, M, D, eps, rows, columns, num_warps=num_warps)
    return out


@on_its_device
def rms_norm_quantised(x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values (M, D) and scales (M, D / 128)."""
    M, D = x_MD.shape
    values = x_MD.new_empty(M, D, dtype=E4M3)
    scales_dM = x_MD.new_empty(triton.cdiv(D, BLOCK), M, dtype=torch.float32)
    if values.numel():
        rows, columns, num_warps = _tile(D)
        _quantised[(triton.cdiv(M, rows),)](
            x_MD.contiguous(), gain_D.contiguous(), values, scales_dM, M, D, eps,
            rows, columns, BLOCK, power_of_two, num_warps=num_warps,
        )  # fmt: skip
    return values, scales_dM.t()


@on_its_device
def rms_norm_backward(grad_MD: Tensor, x_MD: Tensor, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gain."""
    M, D = x_MD.shape
    out = x_MD.new_empty(M, D)
    rows, columns, num_warps = _tile(D, TILE_BACKWARD)
    P = min(PROGRAMS, triton.cdiv(M, rows)) if D else 0
    sums_PD = x_MD.new_empty(P, D, dtype=torch.float32)
    if P:
        _backward[(P,)](
            grad_MD.contiguous(), x_MD.contiguous(), gain_D.contiguous(), out, sums_PD, M, D, eps,
            rows, columns, num_warps=num_warps,
        )  # fmt: skip
    return out, sums_PD.sum(0).to(gain_D.dtype)


def _tile(D: int, size: int = TILE) -> tuple[int, int, int]:
    """Rows, columns (powers of two, whole blocks) and warps of a program of `size` numbers, or of one longer row."""
    columns = max(triton.next_power_of_2(D), BLOCK)
    rows = max(size // columns, 1)
    return rows, columns, 4 * max(columns // size, 1)
