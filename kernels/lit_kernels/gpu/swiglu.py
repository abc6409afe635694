# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false
# (the language inside a kernel is not Python, and a kernel is launched by kernel[grid](...))
"""Triton kernels of silu(gate) * up; `swiglu.py` says what they compute.

A program takes 32 rows of 128 columns, the width of a scale; programs next to each other take neighbouring columns.

Shapes: M rows, F columns of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.fp8 import BLOCK, E4M3
from lit_kernels.gpu import on_its_device
from lit_kernels.gpu.quantise import ROWS, _scales


@triton.jit
def _place(M, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns, which of them there are, and the number of the block of columns."""
    blocks = tl.cdiv(F, COLUMNS)
    block = tl.program_id(0) % blocks
    m = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = block * COLUMNS + tl.arange(0, COLUMNS)
    return m, f, (m[:, None] < M) & (f[None, :] < F), block


@triton.jit
def _product(gate_up, m, f, inside, F):
    """Rounded to the input's dtype."""
    at = gate_up + m[:, None] * (2 * F) + f[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate)) * up).to(gate_up.dtype.element_ty)


@triton.jit
def _forward(gate_up, out, M, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m, f, inside, _ = _place(M, F, ROWS, COLUMNS)
    tl.store(out + m[:, None] * F + f[None, :], _product(gate_up, m, f, inside, F), mask=inside)


@triton.jit
def _quantised(
    gate_up, values, scales, M, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr
):  # fmt: skip
    m, f, inside, block = _place(M, F, ROWS, COLUMNS)
    tile = _product(gate_up, m, f, inside, F).to(tl.float32)
    scale, inverse = _scales(tl.max(tl.abs(tile), 1), POWER_OF_TWO)
    tl.store(values + m[:, None] * F + f[None, :], (tile * inverse[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + block.to(tl.int64) * M + m, scale, mask=m < M)


@triton.jit
def _backward(grad, gate_up, out, M, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m, f, inside, _ = _place(M, F, ROWS, COLUMNS)
    offset = m[:, None] * (2 * F) + f[None, :]
    gate = tl.load(gate_up + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + offset + F, mask=inside, other=0.0).to(tl.float32)
    grad_ = tl.load(grad + m[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad_ * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    kind = out.dtype.element_ty
    tl.store(out + offset, grad_gate.to(kind), mask=inside)
    tl.store(out + offset + F, (grad_ * gate * sigmoid).to(kind), mask=inside)


@on_its_device
def silu_mul(gate_up: Tensor) -> Tensor:
    """(M, 2F) -> (M, F)."""
    M, F = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(M, F)
    if out.numel():
        _forward[_grid(M, F)](gate_up.contiguous(), out, M, F, ROWS, BLOCK)
    return out


@on_its_device
def silu_mul_quantised(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values (M, F) and scales (M, F / 128) of (M, 2F)."""
    M, F = len(gate_up), gate_up.shape[1] // 2
    values = gate_up.new_empty(M, F, dtype=E4M3)
    scales_fM = gate_up.new_empty(triton.cdiv(F, BLOCK), M, dtype=torch.float32)
    if values.numel():
        _quantised[_grid(M, F)](gate_up.contiguous(), values, scales_fM, M, F, ROWS, BLOCK, power_of_two)
    return values, scales_fM.t()


@on_its_device
def silu_mul_backward(grad_MF: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, (M, 2F)."""
    M, F = grad_MF.shape
    out = gate_up.new_empty(M, 2 * F)
    if out.numel():
        _backward[_grid(M, F)](grad_MF.contiguous(), gate_up.contiguous(), out, M, F, ROWS, BLOCK)
    return out


def _grid(M: int, F: int) -> tuple[int]:
    return (triton.cdiv(M, ROWS) * triton.cdiv(F, BLOCK),)
