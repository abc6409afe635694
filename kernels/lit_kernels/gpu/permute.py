# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Triton kernels that move tokens to their experts and back; `permute.py` says what they compute.

A program belongs to a token: its row is read or written once, its K rows of the experts K times. Whoever writes rows
writes zeros to those of nobody, too, which lie behind the last of an expert: a program looks after EACH rows next to
each other, whosever they are.

Shapes: N tokens, K choices of each, S rows, D columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.fp8 import BLOCK, E4M3
from lit_kernels.gpu import on_its_device
from lit_kernels.gpu.quantise import _scales

COLUMNS = 1024  # of a step: 16 bytes of bfloat16 for each thread of 4 warps


@triton.jit
def _clear(rows, end, S, D, d, EACH: tl.constexpr):
    """Zeros to those of this program's rows that are nobody's."""
    zeros = tl.zeros(d.shape, rows.dtype.element_ty)
    for i in tl.static_range(EACH):
        s = tl.program_id(0).to(tl.int64) * EACH + i
        tl.store(rows + s * D + d, zeros, mask=(s >= end) & (s < S) & (d < D))


@triton.jit
def _spread(x, place, last, rows, S, D, K: tl.constexpr, EACH: tl.constexpr, COLUMNS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(x + n * D + d, mask=d < D, other=0.0)
    for k in tl.static_range(K):
        s = tl.load(place + n * K + k).to(tl.int64)
        tl.store(rows + s * D + d, row, mask=(s >= 0) & (d < D))
    _clear(rows, tl.load(last), S, D, d, EACH)


@triton.jit
def _spread_quantised(
    x, place, last, values, scales, S, D,
    K: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    d = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tile = tl.load(x + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale, inverse = _scales(tl.max(tl.abs(tile), 1), POWER_OF_TWO)
    quantised = (tile * inverse[:, None]).to(tl.float8e4nv)
    there = block * BLOCK < D
    for k in tl.static_range(K):
        s = tl.load(place + n * K + k).to(tl.int64)
        tl.store(values + s * D + d, quantised, mask=(s >= 0) & (d < D))
        tl.store(scales + block.to(tl.int64) * S + s, scale, mask=(s >= 0) & there)
    end = tl.load(last)
    _clear(values, end, S, D, d, EACH)
    smallest, _ = _scales(tl.zeros((BLOCKS,), tl.float32), POWER_OF_TWO)
    for i in tl.static_range(EACH):
        s = n * EACH + i
        tl.store(scales + block.to(tl.int64) * S + s, smallest, mask=(s >= end) & (s < S) & there)


@triton.jit
def _collect(rows, place, weights, out, D, K: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        s = tl.load(place + n * K + k).to(tl.int64)
        row = tl.load(rows + s * D + d, mask=(s >= 0) & (d < D), other=0.0).to(tl.float32)
        total += row * tl.load(weights + n * K + k).to(tl.float32) if WEIGHTED else row
    tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _collect_backward(
    grad, rows, place, weights, last, grad_rows, grad_weights, S, D,
    K: tl.constexpr, CHOICES: tl.constexpr, EACH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, CHOICES)
    s = tl.load(place + n * K + k, mask=k < K, other=-1).to(tl.int64)
    weight = tl.load(weights + n * K + k, mask=k < K, other=0.0).to(tl.float32)
    end = tl.load(last)
    products = tl.zeros((CHOICES, COLUMNS), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        grad_ = tl.load(grad + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        at, inside = s[:, None] * D + d[None, :], (s[:, None] >= 0) & (d[None, :] < D)
        products += grad_[None, :] * tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        tile = grad_[None, :] * weight[:, None]
        tl.store(grad_rows + at, tile.to(grad_rows.dtype.element_ty), mask=inside)
        _clear(grad_rows, end, S, D, d, EACH)
    # By choice, not by the product: 0 * NaN of a gradient must not reach the weight of a dropped choice.
    sums = tl.where(s >= 0, tl.sum(products, 1), 0.0)
    tl.store(grad_weights + n * K + k, sums.to(grad_weights.dtype.element_ty), mask=k < K)


@on_its_device
def permute(x_ND: Tensor, place_NK: Tensor, ends_E: Tensor) -> Tensor:
    """(N K, D), each token's row at each of its places."""
    (N, D), (_, K) = x_ND.shape, place_NK.shape
    rows = x_ND.new_empty(N * K, D)
    if rows.numel():
        grid = (N, triton.cdiv(D, COLUMNS))
        _spread[grid](x_ND.contiguous(), place_NK.contiguous(), ends_E[-1:], rows, N * K, D, K, K, COLUMNS)
    return rows


@on_its_device
def permute_quantised(x_ND: Tensor, place_NK: Tensor, ends_E: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values (N K, D) and scales (N K, D / 128)."""
    (N, D), (_, K) = x_ND.shape, place_NK.shape
    values = x_ND.new_empty(N * K, D, dtype=E4M3)
    scales_dS = x_ND.new_empty(triton.cdiv(D, BLOCK), N * K, dtype=torch.float32)
    if values.numel():
        _spread_quantised[(N, triton.cdiv(D, COLUMNS))](
            x_ND.contiguous(), place_NK.contiguous(), ends_E[-1:], values, scales_dS, N * K, D,
            K, K, COLUMNS // BLOCK, BLOCK, power_of_two,
        )  # fmt: skip
    return values, scales_dS.t()


@on_its_device
def unpermute(rows_SD: Tensor, place_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """(N, D), the sum of each token's rows, weighted or not."""
    (N, K), D = place_NK.shape, rows_SD.shape[1]
    out = rows_SD.new_empty(N, D)
    if out.numel():
        place = place_NK.contiguous()
        weights = place if weights_NK is None else weights_NK.contiguous()  # not read where there are none
        grid = (N, triton.cdiv(D, COLUMNS))
        _collect[grid](rows_SD.contiguous(), place, weights, out, D, K, weights_NK is not None, COLUMNS)
    return out


@on_its_device
def unpermute_backward(grad_ND: Tensor, rows_SD: Tensor, place_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows and weights."""
    (S, D), (N, K) = rows_SD.shape, place_NK.shape
    if not rows_SD.numel() or not place_NK.numel():
        return torch.zeros_like(rows_SD, memory_format=torch.contiguous_format), torch.zeros_like(weights_NK)
    grad_rows, grad_weights = rows_SD.new_empty(S, D), weights_NK.new_empty(N, K)
    _collect_backward[(N,)](
        grad_ND.contiguous(), rows_SD.contiguous(), place_NK.contiguous(), weights_NK.contiguous(),
        (place_NK >= 0).sum(dtype=torch.int32), grad_rows, grad_weights, S, D,
        K, triton.next_power_of_2(K), triton.cdiv(S, N), COLUMNS // 2,
    )  # fmt: skip
    return grad_rows, grad_weights
