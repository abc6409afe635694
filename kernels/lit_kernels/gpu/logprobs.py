# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Log-probs and entropies of a linear head in Triton; `logprobs.py` says what they compute and how sums are merged.

    forward     a program takes a tile of rows and a part of the vocabulary, column tile by column tile; its maximum and
                sums go to a row of (parts, M) buffers, which torch merges: no atomics, the same bits in every run
    backward    a chunk of columns at a time: a kernel writes the gradient of the logits, in the products' dtype, into a
                bounded buffer; the library multiplies it with the weight and with the states

    pointers      portable
    descriptors   sm_90: tiles fetched by TMA

Shapes: M targets, V vocabulary, D width; a tile is R of the M rows by C of the V columns, K of D at a time; S parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lit_kernels.gpu import on_its_device

LOWEST = -1e30  # below any logit, and finite: 0 times -infinity is NaN
BUFFER = 2**28  # bytes of the logits' gradient at once
WAVES = 16  # programs for each multiprocessor, so that those without work at the end are few
TOGETHER = 16  # tiles of rows that share a part's weight in the L2 cache
ALIGNED = 16  # bytes: TMA takes no other address or stride
_LOWEST = tl.constexpr(LOWEST)


class Launch(NamedTuple):
    """`R`, `C` and `K` of a tile."""

    R: int
    C: int
    K: int
    warps: int
    stages: int
    descriptors: bool


LAUNCHES = {
    "pointers": Launch(128, 128, 64, 8, 3, False),
    "descriptors": Launch(128, 256, 64, 8, 4, True),
    "float32": Launch(64, 64, 32, 4, 3, False),
}


@triton.jit
def _logits(
    states, weight, m0, v0, M, V, D, stride_x, stride_w, factor,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of logits times `factor`, float32; anything where there is no row or column."""
    m, v = m0 + tl.arange(0, R).to(tl.int64), v0 + tl.arange(0, C).to(tl.int64)
    total = tl.zeros((R, C), tl.float32)
    for d0 in range(0, D, K):
        if DESCRIPTORS:
            x_tile, w_tile = states.load([m0, d0]), weight.load([v0, d0]).T
        else:
            d = d0 + tl.arange(0, K)
            x_at, w_at = m[:, None] * stride_x + d[None, :], v[None, :] * stride_w + d[:, None]
            x_tile = tl.load(states + x_at, mask=(m[:, None] < M) & (d[None, :] < D), other=0.0)
            w_tile = tl.load(weight + w_at, mask=(v[None, :] < V) & (d[:, None] < D), other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    return total * factor


@triton.jit
def _forward(
    states, weight, target, tops, sums, tilts, chosen, M, V, D, stride_x, stride_w, factor, parts, tiles_of_part,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program // (TOGETHER * parts) * TOGETHER
    rows = tl.minimum(tl.cdiv(M, R) - first, TOGETHER)
    place = program % (TOGETHER * parts)
    m0, part = (first + place % rows) * R, place // rows
    m = m0 + tl.arange(0, R)
    wanted = tl.load(target + m, mask=m < M, other=-1)
    top = tl.full((R,), _LOWEST, tl.float32)
    s, t, own = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    begin = part * tiles_of_part
    end = tl.minimum(begin + tiles_of_part, tl.cdiv(V, C))
    for tile in range(begin, end):
        v0 = tile * C
        z = _logits(
            states, weight, m0, v0, M, V, D, stride_x, stride_w, factor, R, C, K, DESCRIPTORS, PRECISION
        )  # fmt: skip
        v = v0 + tl.arange(0, C)
        z = tl.where(v[None, :] < V, z, _LOWEST)
        own += tl.sum(tl.where(v[None, :] == wanted[:, None], z, 0.0), 1)
        new = tl.maximum(top, tl.max(z, 1))
        fall = top - new
        shrink = tl.exp(fall)
        z -= new[:, None]
        p = tl.exp(z)
        t = (t + fall * s) * shrink + tl.sum(p * z, 1)
        s = s * shrink + tl.sum(p, 1)
        top = new
    where = part.to(tl.int64) * M + m
    tl.store(tops + where, top, mask=m < M)
    tl.store(sums + where, s, mask=m < M)
    tl.store(tilts + where, t, mask=m < M)
    here = (wanted >= begin * C) & (wanted < tl.minimum(end * C, V))
    tl.store(chosen + m, own, mask=(m < M) & here)


@triton.jit
def _gradient(
    states, weight, target, normaliser, entropy, grad_logprob, grad_entropy, out,
    M, V, D, stride_x, stride_w, stride_out, first, factor,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TOGETHER: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk of V columns, the first of which is token `first`."""
    program, columns = tl.program_id(0), tl.cdiv(V, C)
    above = program // (TOGETHER * columns) * TOGETHER
    rows = tl.minimum(tl.cdiv(M, R) - above, TOGETHER)
    place = program % (TOGETHER * columns)
    m0, v0 = (above + place % rows) * R, place // rows * C
    m, v = m0 + tl.arange(0, R), v0 + tl.arange(0, C)
    z = _logits(
        states, weight, m0, v0, M, V, D, stride_x, stride_w, factor, R, C, K, DESCRIPTORS, PRECISION
    )  # fmt: skip
    wanted = tl.load(target + m, mask=m < M, other=-1) - first
    g, h = tl.load(grad_logprob + m, mask=m < M, other=0.0), tl.load(grad_entropy + m, mask=m < M, other=0.0)
    log_p = z - tl.load(normaliser + m, mask=m < M, other=0.0)[:, None]
    surprise = log_p + tl.load(entropy + m, mask=m < M, other=0.0)[:, None]
    grad = tl.where(v[None, :] == wanted[:, None], g[:, None], 0.0)
    grad = (grad - tl.exp(log_p) * (g[:, None] + h[:, None] * surprise)) * factor
    where = m[:, None].to(tl.int64) * stride_out + v[None, :]
    tl.store(out + where, grad.to(out.dtype.element_ty), mask=(m[:, None] < M) & (v[None, :] < V))


@on_its_device
def forward(
    states_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and log-normalisers, (M,) float32. A weight of another dtype is copied to `dtype` first."""
    states_MD, weight_VD, target_M = states_MD.to(dtype).contiguous(), weight_VD.to(dtype), target_M.contiguous()
    (M, D), V = states_MD.shape, len(weight_VD)
    weight_VD = weight_VD.contiguous()
    launch = _launch(states_MD, weight_VD)
    row_tiles, tiles = triton.cdiv(M, launch.R), triton.cdiv(V, launch.C)
    wanted = min(triton.cdiv(WAVES * _multiprocessors(states_MD.device), max(row_tiles, 1)), tiles)
    of_part = triton.cdiv(tiles, wanted)
    S = triton.cdiv(tiles, of_part)
    top_SM, s_SM, t_SM = (states_MD.new_empty(S, M, dtype=torch.float32) for _ in range(3))
    chosen_M = states_MD.new_full((M,), torch.nan, dtype=torch.float32)
    if M:
        operands = (*_operands(states_MD, weight_VD, launch), target_M, top_SM, s_SM, t_SM, chosen_M)
        sizes = (M, V, D, states_MD.stride(0), weight_VD.stride(0), 1 / temperature, S, of_part)
        _forward[(row_tiles * S,)](*operands, *sizes, *_constants(launch), **_resources(launch))
    top_M = top_SM.amax(0)
    fall_SM = top_SM - top_M
    shrink_SM = fall_SM.exp()
    s_M = (s_SM * shrink_SM).sum(0)
    t_M = ((t_SM + fall_SM * s_SM) * shrink_SM).sum(0)
    log_s_M = s_M.log()
    return chosen_M - top_M - log_s_M, log_s_M - t_M / s_M, top_M + log_s_M


@on_its_device
def backward(
    gradients_M: tuple[Tensor, Tensor],
    states_MD: Tensor,
    weight_VD: Tensor,
    rows_M: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    dtype: torch.dtype,
    of_states: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of states and weight, empty where not wanted.

    Args:
        gradients_M: of log-probs and entropies.
        rows_M: targets, log-normalisers, entropies.
    """
    x_MD = states_MD.to(dtype).contiguous()
    (M, D), V = x_MD.shape, len(weight_VD)
    vectors = [x.contiguous() for x in (*rows_M, *gradients_M)]
    grad_states = x_MD.new_zeros(x_MD.shape if of_states else 0, dtype=torch.float32)
    grad_weight = (weight_VD.new_empty if M else weight_VD.new_zeros)(V if of_weight else 0, D)
    part_MD = torch.empty_like(grad_states)
    for columns, grad_z_MC in _chunks(M, V, x_MD):
        weight_CD = weight_VD[columns].to(dtype).contiguous()
        launch, C = _launch(x_MD, weight_CD), len(weight_CD)
        operands = (*_operands(x_MD, weight_CD, launch), *vectors, grad_z_MC)
        sizes = (M, C, D, x_MD.stride(0), weight_CD.stride(0), grad_z_MC.stride(0), columns.start, 1 / temperature)
        grid = (triton.cdiv(M, launch.R) * triton.cdiv(C, launch.C),)
        _gradient[grid](*operands, *sizes, *_constants(launch), **_resources(launch))
        with torch.autocast(x_MD.device.type, enabled=False):
            if of_states:
                _multiply(grad_z_MC, weight_CD, part_MD)
                grad_states += part_MD
            if of_weight:
                _multiply(grad_z_MC.t(), x_MD, grad_weight[columns])
    return grad_states.to(states_MD.dtype), grad_weight.view(weight_VD.shape if of_weight else (0,))


def _chunks(M: int, V: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns, and room for their gradient: `BUFFER` bytes (or 128 columns), rows of a stride the library likes."""
    C = min(max(BUFFER // max(M * like.element_size(), 1) // 128 * 128, 128), triton.cdiv(V, 128) * 128)
    room_MC = like.new_empty(M, C)
    for start in range(0, V if M else 0, C):
        stop = min(start + C, V)
        yield slice(start, stop), room_MC[:, : stop - start]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b, summed in float32 and rounded once."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and out.device.type == "cuda":
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _launch(states_MD: Tensor, weight_VD: Tensor) -> Launch:
    if states_MD.dtype == torch.float32:
        return LAUNCHES["float32"]
    fits = all(x.data_ptr() % ALIGNED == x.stride(0) * x.element_size() % ALIGNED == 0 for x in (states_MD, weight_VD))
    return LAUNCHES["descriptors" if fits and _is_hopper(states_MD.device) else "pointers"]


def _operands(states_MD: Tensor, weight_VD: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
    if not launch.descriptors:
        return states_MD, weight_VD
    return tuple(  # type: ignore[return-value]
        TensorDescriptor.from_tensor(x, [side, launch.K]) for x, side in ((states_MD, launch.R), (weight_VD, launch.C))
    )


def _constants(launch: Launch) -> tuple[int, int, int, int, bool, str]:
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"  # of float32 only
    return launch.R, launch.C, launch.K, TOGETHER, launch.descriptors, precision


def _resources(launch: Launch) -> dict[str, int]:
    return {"num_warps": launch.warps, "num_stages": launch.stages}


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
