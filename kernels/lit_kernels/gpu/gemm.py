# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Products of E4M3 matrices with block scales, in Triton: out = a b^T, both with their summed dimension contiguous.

    forward            y  = x w^T            rows   x blocks
    input's gradient   dx = dy (w^T)^T       rows   x blocks of w^T
    weight's gradient  dw = dy^T (x^T)^T     rows of dy^T  x  rows of x^T

Tensor cores sum FP8 products with about 14 bits on Hopper; every 128 of them the sum is scaled and added in float32
(2412.19437 section 3.3.2), which here is one step of the loop.

    pointers      portable: one program per tile
    descriptors   sm_90: as many programs as multiprocessors, tiles fetched and stored by TMA
    specialised   the same; one group of warps fetches for two others, which multiply

Shapes: M rows of a, N rows of b, K summed; k = K / 128 scales."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lit_kernels.fp8 import BLOCK, Quantised
from lit_kernels.gemm import is_in_blocks
from lit_kernels.gpu import on_its_device

Form = Literal["auto", "pointers", "descriptors", "specialised"]
TILE_M, TILE_N = 64, 128  # by pointers
SIDE = 128  # of a tile by descriptors: with 128 x 256 the two sums no longer fit the registers
TOGETHER = 8  # rows of tiles that are walked through column by column, so that a and b are found in the L2 cache
ALIGNED = 16  # bytes: TMA takes no other address or stride


class Launch(NamedTuple):
    """Specialising warps takes effect only with 4 of them (one group) and loops that are not flattened."""

    warps: int
    stages: int
    specialised: bool


LAUNCHES = {"descriptors": Launch(8, 4, False), "specialised": Launch(4, 4, True)}
SM90 = "descriptors"  # which of them "auto" takes there: neither has been timed


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


@triton.jit
def _gemm_persistent(
    a, a_scales, b, b_scales, out, M, N, K,
    SIDE: tl.constexpr, TILE_K: tl.constexpr, TOGETHER: tl.constexpr,
    B_IN_BLOCKS: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    tl.static_assert(SIDE == TILE_K, "a tile's columns share one block's scale")
    if SPECIALISED:  # two groups of warps take half of the rows each, which the compiler can only do to its own ones
        a = tl.make_tensor_descriptor(a, [M, K], [K, 1], [SIDE, TILE_K])
        out = tl.make_tensor_descriptor(out, [M, N], [N, 1], [SIDE, SIDE])
    tiles_m, tiles_n, steps = tl.cdiv(M, SIDE), tl.cdiv(N, SIDE), tl.cdiv(K, TILE_K)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False, warp_specialize=SPECIALISED
    ):
        first = tile // (TOGETHER * tiles_n) * TOGETHER
        rows = tl.minimum(tiles_m - first, TOGETHER)
        place = tile % (TOGETHER * tiles_n)
        m0, n0 = (first + place % rows) * SIDE, place // rows * SIDE
        m, n = m0 + tl.arange(0, SIDE), n0 + tl.arange(0, SIDE)
        total = tl.zeros((SIDE, SIDE), tl.float32)
        for step in range(steps):
            product = tl.dot(a.load([m0, step * TILE_K]), b.load([n0, step * TILE_K]).T)
            scale = tl.load(a_scales + step * M + m, mask=m < M, other=0.0)
            if B_IN_BLOCKS:
                one = n0 // SIDE * steps + step + tl.zeros_like(m)  # a vector of one address, see _gemm
                total += product * (scale * tl.load(b_scales + one))[:, None]
            else:
                b_scale = tl.load(b_scales + step * N + n, mask=n < N, other=0.0)
                total += product * (scale[:, None] * b_scale[None, :])
        out.store([m0, n0], total.to(out.dtype))


@on_its_device
def gemm(a: Quantised, b: Quantised, dtype: torch.dtype = torch.bfloat16, form: Form = "auto") -> Tensor:
    """a b^T (M, N) of rows `a` (M, K) and rows or blocks `b` (N, K)."""
    in_blocks = is_in_blocks(a, b)
    (M, K), N = a.values.shape, len(b.values)
    out = a.values.new_empty(M, N, dtype=dtype)
    if not K:
        return out.zero_()
    if not out.numel():
        return out
    fits = all(_fits(x) for x in (a.values, b.values, out))
    if form == "auto":
        form = SM90 if fits and _is_hopper(out.device) else "pointers"
    scales = (a.scales.t().contiguous(), b.scales.contiguous() if in_blocks else b.scales.t().contiguous())
    if form == "pointers":
        grid = (triton.cdiv(M, TILE_M), triton.cdiv(N, TILE_N))
        operands = (a.values.contiguous(), scales[0], b.values.contiguous(), scales[1], out)
        _gemm[grid](*operands, M, N, K, TILE_M, TILE_N, BLOCK, in_blocks, num_warps=4, num_stages=3)
        return out
    if not fits:
        raise ValueError(
            f"form={form!r} got K={K} and N={N} of {dtype}; valid: rows of a, b and out that are contiguous and a "
            f"multiple of {ALIGNED} bytes. Type form='pointers'"
        )
    launch = LAUNCHES[form]
    a_tiles, b_tiles, tiles = (TensorDescriptor.from_tensor(x, [SIDE, SIDE]) for x in (a.values, b.values, out))
    if launch.specialised:
        a_tiles, tiles = a.values, out
        triton.set_allocator(_scratch)
    grid = (min(triton.cdiv(M, SIDE) * triton.cdiv(N, SIDE), _multiprocessors(out.device)),)
    _gemm_persistent[grid](
        a_tiles, scales[0], b_tiles, scales[1], tiles, M, N, K,
        SIDE, BLOCK, TOGETHER, in_blocks, launch.specialised, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _scratch(size: int, _: int, __: int | None) -> Tensor:
    """Where a kernel puts descriptors that it makes itself."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _fits(x: Tensor) -> bool:
    """Whether a descriptor can hold it."""
    return x.is_contiguous() and not (x.stride(0) * x.element_size() % ALIGNED or x.data_ptr() % ALIGNED)
