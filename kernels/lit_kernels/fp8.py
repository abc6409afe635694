"""Numbers in 8 bits, as DeepSeek-V3 trains with them (2412.19437 section 3.3): E4M3, one float32 scale per block.

    rows     1 x 128 along the last dimension: activations and their gradients
    blocks   128 x 128: weights
    both     rows, and rows of the transpose, from one read: the gradient of a weight sums over tokens

    value = q * scale,   scale = largest |value| of the block / 448

Here is the reference in plain torch, which defines every bit; `quantise.py` has the kernels. NaN stays NaN and leaves
its block's scale alone; a block with an infinity becomes NaN.

Shapes: M rows, K columns, N rows of a weight; k, m, n: blocks of 128 of them, the last one may be shorter."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
SMALLEST = 1e-12  # a block of zeros, or nearly so, gets the scale of this

Scales = Literal["float", "power of two"]


class Quantised(NamedTuple):
    """`values` E4M3 and `scales` float32: (M, K) with (M, k) for rows, (N, K) with (n, k) for blocks.

    The scales of rows are stored column by column (stride 1 along M), as tensor-core products read them.
    """

    values: Tensor
    scales: Tensor


def scales_of(amax: Tensor, kind: Scales) -> tuple[Tensor, Tensor]:
    """Scales and what to multiply by, of the largest absolute values (float32).

    Powers of two are rounded up, so that nothing is cut off; they make a transpose exact (2511.02302).
    """
    amax = amax.clamp(min=SMALLEST)
    largest = torch.full_like(amax, LARGEST)  # torch divides by, and divides, a number through its reciprocal
    if kind == "float":
        return amax / largest, largest / amax
    bits = (amax / largest).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    inverse = ((254 - exponent) << 23).masked_fill(exponent == 255, 0)  # of an infinity: all of the block is NaN
    return (exponent << 23).view(torch.float32), inverse.view(torch.float32)


def quantise_rows_reference(x_MK: Tensor, kind: Scales = "float") -> Quantised:
    """One scale per 128 neighbours of a row."""
    K = x_MK.shape[1]
    padded = F.pad(x_MK.float(), (0, -K % BLOCK)) if K % BLOCK else x_MK.float()  # F.pad copies for nothing too
    blocks_MkB = padded.unflatten(1, (-1, BLOCK))
    scale_Mk, inverse_Mk = scales_of(_size(blocks_MkB).amax(-1), kind)
    values = (blocks_MkB * inverse_Mk[..., None]).to(E4M3).flatten(1)[:, :K]
    return Quantised(values.contiguous(), scale_Mk.t().contiguous().t())


def quantise_blocks_reference(w_NK: Tensor, kind: Scales = "float") -> Quantised:
    """One scale per 128 x 128."""
    N, K = w_NK.shape
    padded = F.pad(w_NK.float(), (0, -K % BLOCK, 0, -N % BLOCK))
    blocks_nBkB = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale_nk, inverse_nk = scales_of(_size(blocks_nBkB).amax((1, 3)), kind)
    values = (blocks_nBkB * inverse_nk[:, None, :, None]).to(E4M3).flatten(2).flatten(0, 1)
    return Quantised(values[:N, :K].contiguous(), scale_nk)


def quantise_both_reference(x_MK: Tensor, kind: Scales = "float") -> tuple[Quantised, Quantised]:
    """Rows of x and rows of its transpose."""
    return quantise_rows_reference(x_MK, kind), quantise_rows_reference(x_MK.t().contiguous(), kind)


def dequantise_rows(q: Quantised) -> Tensor:
    """float32 (M, K)."""
    return widened(q.values) * q.scales.repeat_interleave(BLOCK, 1)[:, : q.values.shape[1]]


def dequantise_blocks(q: Quantised) -> Tensor:
    """float32 (N, K)."""
    N, K = q.values.shape
    return widened(q.values) * q.scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]


def widened(values: Tensor) -> Tensor:
    """E4M3 in float32, as `.float()`, which takes a number at a time on a CPU: four times faster there."""
    if values.device.type != "cpu":
        return values.float()
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # float16 / 256
    bits.bitwise_or_((bits + 0x80) & 0x4000)  # NaN is the one with all bits set but the sign's
    return bits.view(torch.float16).float().mul_(256)


def gemm_reference(a: Quantised, b: Quantised, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a b^T of rows `a` and rows or blocks `b`: dequantised, summed in float32, rounded once."""
    rows = b.scales.shape == (len(b.values), a.scales.shape[1])
    return (dequantise_rows(a) @ (dequantise_rows(b) if rows else dequantise_blocks(b)).t()).to(dtype)


def _size(x: Tensor) -> Tensor:
    return x.abs().nan_to_num_(0.0, posinf=float("inf"))
