# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Products of E4M3 matrices with block scales, in Triton: out = a b^T, both with their summed dimension contiguous.

    forward            y  = x w^T            rows   x blocks
    input's gradient   dx = dy (w^T)^T       rows   x blocks of w^T
    weight's gradient  dw = dy^T (x^T)^T     rows of dy^T  x  rows of x^T

Tensor cores sum FP8 products with about 14 bits on Hopper; every 128 of them the sum is scaled and added in float32
(2412.19437 section 3.3.2), which here is one step of the loop. This is the portable form, on pointers.

Shapes: M rows of a, N rows of b, K summed; k = K / 128 scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.fp8 import BLOCK, Quantised

TILE_M, TILE_N = 64, 128


@triton.jit
def _gemm(
    a, a_scales, b, b_scales, out, M, N, K,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, B_IN_BLOCKS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    depth = tl.arange(0, TILE_K)
    steps = tl.cdiv(K, TILE_K)
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for step in range(steps):
        k = step * TILE_K + depth
        a_tile = tl.load(a + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b_tile = tl.load(b + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        a_scale = tl.load(a_scales + step * M + m, mask=m < M, other=0.0)
        # As a vector even where it is one number: a scalar load has raced with the pipeline (tritonbench #1163).
        where = n // TILE_K * steps + step if B_IN_BLOCKS else step * N + n
        b_scale = tl.load(b_scales + where, mask=n < N, other=0.0)
        total += tl.dot(a_tile, b_tile) * (a_scale[:, None] * b_scale[None, :])
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


def gemm(a: Quantised, b: Quantised, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a b^T (M, N) of rows `a` (M, K) and rows or blocks `b` (N, K)."""
    (M, K), N = a.values.shape, len(b.values)
    k = triton.cdiv(K, BLOCK)
    in_blocks = b.scales.shape != (N, k)
    if (
        b.values.shape[1] != K
        or a.scales.shape != (M, k)
        or (in_blocks and b.scales.shape != (triton.cdiv(N, BLOCK), k))
    ):
        raise ValueError(
            f"got a {tuple(a.values.shape)} with scales {tuple(a.scales.shape)} and b {tuple(b.values.shape)} with "
            f"scales {tuple(b.scales.shape)}; valid: (M, K) with (M, k), (N, K) with (N, k) or (n, k), for k = K / 128"
        )
    out = a.values.new_empty(M, N, dtype=dtype)
    if out.numel():
        grid = (triton.cdiv(M, TILE_M), triton.cdiv(N, TILE_N))
        _gemm[grid](
            a.values, a.scales.t(), b.values, b.scales if in_blocks else b.scales.t(), out, M, N, K,
            TILE_M, TILE_N, BLOCK, in_blocks, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
