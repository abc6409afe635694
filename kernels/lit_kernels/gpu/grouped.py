# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Grouped products in Triton; each expert's rows are found inside the kernel, from where they end.

    rows       out = x w_e^T, or x w_e, over the rows of each expert      bf16, fp16, fp32, and FP8 with block scales
    weights    dw_e = grad^T x, summed over the rows of each expert       the same; one kernel each

Every kernel is persistent: as many programs as multiprocessors walk through the tiles. A tile has rows of one expert
only; what it reads of the next one's is masked when it is stored, or, where it would be summed, when it is read.

    pointers       portable
    descriptors    sm_90: tiles are fetched by TMA, and stored by pointers, since a store by TMA has no mask

Shapes: S rows sorted by expert, E experts, N columns of the result, K summed; F outputs and D inputs of an expert. For
FP8: k, n: blocks of 128; P rows, every expert's padded to a multiple of 128, p = P / 128."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lit_kernels.fp8 import BLOCK, Quantised
from lit_kernels.gpu import on_its_device

Form = Literal["auto", "pointers", "descriptors"]
TOGETHER = 8  # rows of tiles that are walked through column by column, so that both operands are found in the L2 cache
ALIGNED = 16  # bytes: TMA takes no other address or stride
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Launch(NamedTuple):
    """A tile of rows x columns x what is summed in one step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


PLAIN = {"pointers": Launch(64, 128, 32, 4, 3), "descriptors": Launch(128, 256, 64, 8, 4)}
PLAIN_WEIGHTS = {"pointers": Launch(64, 128, 32, 4, 3), "descriptors": Launch(128, 256, 64, 8, 3)}
FP8 = {"pointers": Launch(64, BLOCK, BLOCK, 4, 3), "descriptors": Launch(128, BLOCK, BLOCK, 8, 4)}


@triton.jit
def groups(ends, S, E, GROUPS: tl.constexpr, SIDE: tl.constexpr):
    """Of each expert, and of nobody (number E): its first row, where it ends, its first tile, where its tiles end."""
    e = tl.arange(0, GROUPS)
    end = tl.minimum(tl.load(ends + e, mask=e < E, other=S), S)
    start = tl.minimum(tl.load(ends + e - 1, mask=(e > 0) & (e <= E), other=0), S)
    start = tl.where(e > E, S, start)
    tiles = (end - start + SIDE - 1) // SIDE
    upto = tl.cumsum(tiles, 0)
    return start, end, upto - tiles, upto


@triton.jit
def of(values, e, GROUPS: tl.constexpr):
    """values[e], which registers cannot be indexed by."""
    return tl.sum(tl.where(tl.arange(0, GROUPS) == e, values, 0), 0)


@triton.jit
def _rows(
    x, x_scales, w, w_scales, out, ends, S, E, N, K,
    GROUPS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, TOGETHER: tl.constexpr,
    TRANSPOSED: tl.constexpr, SCALED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """w is (E, N, K), (E, K, N) if TRANSPOSED; with TMA x and w are descriptors, w's of two dimensions."""
    start, end, first_tile, upto = groups(ends, S, E, GROUPS, TILE_M)
    tiles_n, steps = tl.cdiv(N, TILE_N), tl.cdiv(K, TILE_K)
    for tile in tl.range(tl.program_id(0), tl.max(upto, 0) * tiles_n, tl.num_programs(0), flatten=False):
        e = tl.sum((upto <= tile // tiles_n).to(tl.int32), 0)
        before = of(first_tile, e, GROUPS)
        place = tile - before * tiles_n
        top = place // (TOGETHER * tiles_n) * TOGETHER
        height = tl.minimum(of(upto, e, GROUPS) - before - top, TOGETHER)
        place = place % (TOGETHER * tiles_n)
        m0, n0 = of(start, e, GROUPS) + (top + place % height) * TILE_M, place // height * TILE_N
        m, n = m0 + tl.arange(0, TILE_M), n0 + tl.arange(0, TILE_N)
        mine = m < of(end, e, GROUPS)
        expert = e.to(tl.int64)
        total = tl.zeros((TILE_M, TILE_N), tl.float32)
        for step in range(tl.where(e < E, steps, 0)):  # nobody's rows are zero
            if TMA:
                x_tile = x.load([m0, step * TILE_K])
                if TRANSPOSED:
                    w_tile = w.load([e * K + step * TILE_K, n0])
                else:
                    w_tile = w.load([e * N + n0, step * TILE_K]).T
            else:
                k = step * TILE_K + tl.arange(0, TILE_K)
                x_at = m[:, None].to(tl.int64) * K + k[None, :]
                x_tile = tl.load(x + x_at, mask=mine[:, None] & (k[None, :] < K), other=0.0)
                w_at = expert * N * K + (k[:, None] * N + n[None, :] if TRANSPOSED else n[None, :] * K + k[:, None])
                w_tile = tl.load(w + w_at, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
            if SCALED:
                # As a vector, though it is one number: a scalar load has raced with the pipeline (tritonbench #1163).
                one = (expert * tl.cdiv(N, TILE_K) + n0 // TILE_K) * steps + step + tl.zeros_like(m)
                scale = tl.load(x_scales + tl.cast(step, tl.int64) * S + m, mask=mine, other=0.0) * tl.load(
                    w_scales + one
                )
                total += tl.dot(x_tile, w_tile) * scale[:, None]
            else:
                total = tl.dot(x_tile, w_tile, total, input_precision="ieee")
        out_at = m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(out + out_at, total.to(out.dtype.element_ty), mask=mine[:, None] & (n[None, :] < N))


@triton.jit
def _tile(x, s, end, column, columns):
    """Of rows, zero from `end` on."""
    inside = (s[:, None] < end) & (column[None, :] < columns)
    return tl.load(x + s[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)


@triton.jit
def _weights(
    grad, x, grad_tiles, x_tiles, out, ends, S, E, F, D,
    TILE_F: tl.constexpr, TILE_D: tl.constexpr, TILE_S: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Whole steps by TMA where there is one; the last one, which may reach into the next expert's rows, by pointers."""
    tiles_d = tl.cdiv(D, TILE_D)
    each = tl.cdiv(F, TILE_F) * tiles_d
    for tile in tl.range(tl.program_id(0), E * each, tl.num_programs(0), flatten=False):
        e, place = tile // each, tile % each
        f0, d0 = place // tiles_d * TILE_F, place % tiles_d * TILE_D
        f, d = f0 + tl.arange(0, TILE_F), d0 + tl.arange(0, TILE_D)
        start = tl.minimum(tl.load(ends + e - 1, mask=e > 0, other=0), S)
        end = tl.minimum(tl.load(ends + e), S)
        total = tl.zeros((TILE_F, TILE_D), tl.float32)
        if TMA:
            whole = (end - start) // TILE_S
            for step in range(whole):
                s0 = start + step * TILE_S
                total = tl.dot(grad_tiles.load([s0, f0]).T, x_tiles.load([s0, d0]), total)
            start += whole * TILE_S
        for s0 in tl.range(start, end, TILE_S, num_stages=1 if TMA else None):
            s = s0 + tl.arange(0, TILE_S)
            grad_tile, x_tile = _tile(grad, s, end, f, F), _tile(x, s, end, d, D)
            total = tl.dot(grad_tile.T, x_tile, total, input_precision="ieee")
        at = e.to(tl.int64) * F * D + f[:, None].to(tl.int64) * D + d[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(f[:, None] < F) & (d[None, :] < D))


@triton.jit
def _weights_fp8(
    grad, grad_scales, x, x_scales, out, ends, S, E, F, D, P,
    GROUPS: tl.constexpr, TILE_F: tl.constexpr, TILE_D: tl.constexpr, TILE_S: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """grad (F, P) and x (D, P) are laid out as by `grouped_fp8.quantise_by_expert`: no step reaches into the next."""
    _, _, first_block, upto = groups(ends, S, E, GROUPS, TILE_S)
    tiles_d = tl.cdiv(D, TILE_D)
    each = tl.cdiv(F, TILE_F) * tiles_d
    for tile in tl.range(tl.program_id(0), E * each, tl.num_programs(0), flatten=False):
        e, place = tile // each, tile % each
        f0, d0 = place // tiles_d * TILE_F, place % tiles_d * TILE_D
        f, d = f0 + tl.arange(0, TILE_F), d0 + tl.arange(0, TILE_D)
        total = tl.zeros((TILE_F, TILE_D), tl.float32)
        for block in range(of(first_block, e, GROUPS), of(upto, e, GROUPS)):
            if TMA:
                product = tl.dot(grad.load([f0, block * TILE_S]), x.load([d0, block * TILE_S]).T)
            else:
                s = block * TILE_S + tl.arange(0, TILE_S)
                grad_tile = tl.load(grad + f[:, None].to(tl.int64) * P + s[None, :], mask=f[:, None] < F, other=0.0)
                x_tile = tl.load(x + d[None, :].to(tl.int64) * P + s[:, None], mask=d[None, :] < D, other=0.0)
                product = tl.dot(grad_tile, x_tile)
            row = tl.cast(block, tl.int64)
            grad_scale = tl.load(grad_scales + row * F + f, mask=f < F, other=0.0)
            total += product * (grad_scale[:, None] * tl.load(x_scales + row * D + d, mask=d < D, other=0.0)[None, :])
        at = e.to(tl.int64) * F * D + f[:, None].to(tl.int64) * D + d[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(f[:, None] < F) & (d[None, :] < D))


@on_its_device
def grouped_mm(x_SK: Tensor, w: Tensor, ends_E: Tensor, transposed: bool = False, form: Form = "auto") -> Tensor:
    """x w_e^T (S, N) of w (E, N, K), or x w_e of w (E, K, N) if `transposed`; both contiguous."""
    (S, K), E, N = x_SK.shape, len(w), w.shape[2 if transposed else 1]
    _check(x_SK, w, w.shape[1 if transposed else 2], K, ends_E)
    out = x_SK.new_empty(S, N)
    if not (out.numel() and K and E):
        return out.zero_()
    form = _form(form, (x_SK, w), K % PLAIN["descriptors"].k if transposed else 0)
    launch = PLAIN[form]
    w_tile = (launch.k, launch.n) if transposed else (launch.n, launch.k)
    tiles = _tiles(form, (x_SK, (launch.m, launch.k)), (w.flatten(0, 1), w_tile))
    grid = (_programs(triton.cdiv(S + E * launch.m, launch.m) * triton.cdiv(N, launch.n), x_SK.device),)
    _rows[grid](
        tiles[0], None, tiles[1], None, out, ends_E, S, E, N, K, _power(E), *launch[:3], TOGETHER,
        transposed, False, form != "pointers", num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


@on_its_device
def grouped_mm_weights(grad_SF: Tensor, x_SD: Tensor, ends_E: Tensor, form: Form = "auto") -> Tensor:
    """grad^T x over the rows of each expert, (E, F, D); both contiguous."""
    (S, F), D, E = grad_SF.shape, x_SD.shape[1], len(ends_E)
    _check(grad_SF, x_SD, len(x_SD), S, ends_E)
    out = x_SD.new_empty(E, F, D)
    if not (out.numel() and S):
        return out.zero_()
    form = _form(form, (grad_SF, x_SD))
    launch = PLAIN_WEIGHTS[form]
    tiles = _tiles(form, (grad_SF, (launch.k, launch.m)), (x_SD, (launch.k, launch.n)))
    grid = (_programs(E * triton.cdiv(F, launch.m) * triton.cdiv(D, launch.n), out.device),)
    _weights[grid](
        grad_SF, x_SD, *tiles, out, ends_E, S, E, F, D, *launch[:3],
        form != "pointers", num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


@on_its_device
def fp8_gemm(a: Quantised, b: Quantised, ends_E: Tensor, dtype: torch.dtype, form: Form = "auto") -> Tensor:
    """a b_e^T (S, N) of rows `a` (S, K) and blocks `b` (E, N, K) with scales (E, n, k)."""
    (S, K), (E, N, _) = a.values.shape, b.values.shape
    out = a.values.new_empty(S, N, dtype=dtype)
    if not (out.numel() and K and E):
        return out.zero_()
    a_values, b_values = a.values.contiguous(), b.values.contiguous()
    form = _form(form, (a_values, b_values))
    launch = FP8[form]
    tiles = _tiles(form, (a_values, (launch.m, launch.k)), (b_values.flatten(0, 1), (launch.n, launch.k)))
    grid = (_programs(triton.cdiv(S + E * launch.m, launch.m) * triton.cdiv(N, launch.n), out.device),)
    _rows[grid](
        tiles[0], a.scales.t().contiguous(), tiles[1], b.scales.contiguous(), out, ends_E, S, E, N, K, _power(E),
        *launch[:3], TOGETHER, False, True, form != "pointers", num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


@on_its_device
def fp8_gemm_weights(
    a: Quantised, b: Quantised, ends_E: Tensor, S: int, dtype: torch.dtype, form: Form = "auto"
) -> Tensor:
    """a_e b_e^T (E, F, D) of `a` (F, P) and `b` (D, P), both by expert."""
    (F, P), D, E = a.values.shape, len(b.values), len(ends_E)
    out = a.values.new_empty(E, F, D, dtype=dtype)
    if not (out.numel() and S):
        return out.zero_()
    a_values, b_values = a.values.contiguous(), b.values.contiguous()
    form = _form(form, (a_values, b_values))
    launch = FP8[form]
    tiles = _tiles(form, (a_values, (launch.m, launch.k)), (b_values, (launch.n, launch.k)))
    grid = (_programs(E * triton.cdiv(F, launch.m) * triton.cdiv(D, launch.n), out.device),)
    _weights_fp8[grid](
        tiles[0], a.scales.t().contiguous(), tiles[1], b.scales.t().contiguous(), out, ends_E, S, E, F, D, P,
        _power(E), *launch[:3], form != "pointers", num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out


def _check(a: Tensor, b: Tensor, summed: int, expected: int, ends_E: Tensor) -> None:
    if a.dtype not in DTYPES or b.dtype != a.dtype or summed != expected or ends_E.dtype != torch.int32:
        raise ValueError(
            f"got {tuple(a.shape)} of {a.dtype}, {tuple(b.shape)} of {b.dtype} and ends of {ends_E.dtype}; valid: "
            "shapes that fit, of one dtype, bfloat16, float16 or float32, and ends of int32"
        )


def _form(form: Form, operands: tuple[Tensor, ...], rest: int = 0) -> Form:
    """`rest`: what is left of the summed dimension after whole steps, if a step may not reach behind it."""
    fits = not rest and all(
        x.element_size() < 4 and x.shape[-1] * x.element_size() % ALIGNED == 0 and x.data_ptr() % ALIGNED == 0
        for x in operands
    )
    if form == "auto":
        device = operands[0].device
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        return "descriptors" if fits and hopper else "pointers"
    if form == "descriptors" and not fits:
        shapes = " and ".join(f"{tuple(x.shape)} of {x.dtype}" for x in operands)
        raise ValueError(
            f"form='descriptors' got {shapes}; valid: 8 or 16 bits, rows of a multiple of {ALIGNED} bytes, and with "
            f"w transposed K a multiple of {PLAIN['descriptors'].k}. Type form='pointers'"
        )
    return form


def _tiles(form: str, *operands: tuple[Tensor, tuple[int, int]]) -> list[Tensor | TensorDescriptor]:
    if form == "pointers":
        return [x for x, _ in operands]
    return [TensorDescriptor.from_tensor(x, list(tile)) for x, tile in operands]


def _power(E: int) -> int:
    """Of two, with a place for nobody's rows."""
    return 1 << E.bit_length()


def _programs(tiles: int, device: torch.device) -> int:
    most = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(tiles, most)
