# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Quantisers of grouped products in Triton; `grouped_fp8.py` says what they compute, bit by bit.

Shapes: S rows sorted by expert, E experts, F outputs and D inputs of each; d, f: blocks of 128; P rows, every expert's
padded to a multiple of 128, p = P / 128."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.fp8 import BLOCK, E4M3, Quantised, Scales
from lit_kernels.gpu import on_its_device
from lit_kernels.gpu.grouped import groups, of
from lit_kernels.gpu.quantise import _blocks, _scales


@triton.jit
def _by_expert(
    x, values, scales, values_t, scales_t, ends, S, E, D, P,
    GROUPS: tl.constexpr, SIDE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """A block of 128 rows of one expert, of nobody, or of none at all; all but an expert's are zero."""
    start, end, first_block, upto = groups(ends, S, E, GROUPS, SIDE)
    block = tl.program_id(0)
    e = tl.sum((upto <= block).to(tl.int32), 0)
    begin = of(start, e, GROUPS) + (block - of(first_block, e, GROUPS)) * SIDE
    s = begin.to(tl.int64) + tl.arange(0, SIDE)
    d = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    here = s < of(end, e, GROUPS)
    inside = here[:, None] & (d[None, :] < D)
    tile = tl.load(x + s[:, None] * D + d[None, :], mask=inside & (e < E), other=0.0).to(tl.float32)
    size = tl.abs(tile)
    scale, inverse = _scales(tl.max(size, 1), POWER_OF_TWO)
    tl.store(values + s[:, None] * D + d[None, :], (tile * inverse[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + tl.program_id(1).to(tl.int64) * S + s, scale, mask=here)
    scale, inverse = _scales(tl.max(size, 0), POWER_OF_TWO)
    turned = tl.trans((tile * inverse[None, :]).to(tl.float8e4nv))
    column = block * SIDE + tl.arange(0, SIDE)
    tl.store(values_t + d[:, None].to(tl.int64) * P + column[None, :], turned, mask=d[:, None] < D)
    tl.store(scales_t + block.to(tl.int64) * D + d, scale, mask=d < D)


@on_its_device
def quantise_by_expert(x_SD: Tensor, ends_E: Tensor, p: int, kind: Scales = "float") -> tuple[Quantised, Quantised]:
    """See `grouped_fp8.quantise_by_expert_reference`; x is contiguous."""
    (S, D), E = x_SD.shape, len(ends_E)
    d, P = triton.cdiv(D, BLOCK), p * BLOCK
    values, scales_dS = x_SD.new_empty(S, D, dtype=E4M3), x_SD.new_empty(d, S, dtype=torch.float32)
    values_DP, scales_pD = x_SD.new_empty(D, P, dtype=E4M3), x_SD.new_empty(p, D, dtype=torch.float32)
    if values_DP.numel():
        _by_expert[(p, d)](
            x_SD, values, scales_dS, values_DP, scales_pD, ends_E, S, E, D, P,
            triton.next_power_of_2(E + 1), BLOCK, kind == "power of two", num_warps=8,
        )  # fmt: skip
    return Quantised(values, scales_dS.t()), Quantised(values_DP, scales_pD.t())


@on_its_device
def quantise_experts(w_EFD: Tensor, kind: Scales = "float", transposed: bool = False) -> Quantised:
    """`quantise_blocks` of every expert, of its transpose if `transposed`; w is contiguous."""
    E, F, D = w_EFD.shape
    f, d = triton.cdiv(F, BLOCK), triton.cdiv(D, BLOCK)
    values = w_EFD.new_empty((E, D, F) if transposed else (E, F, D), dtype=E4M3)
    scales = w_EFD.new_empty((E, d, f) if transposed else (E, f, d), dtype=torch.float32)
    if w_EFD.numel():
        constants = (BLOCK, kind == "power of two", transposed)
        _blocks[(f, d, E)](w_EFD, values, scales, F, D, D, *constants, num_warps=8)
    return Quantised(values, scales)
