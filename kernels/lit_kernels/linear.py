"""A linear layer whose three products run in FP8, as DeepSeek-V3 was trained (2412.19437 section 3.3).

    y  = x w^T      rows of x       x  blocks of w
    dx = dy w       rows of dy      x  blocks of w^T, the same numbers
    dw = dy^T x     rows of dy^T    x  rows of x^T: scales along the tokens that are summed over

Everything is E4M3 and scaled when it is used; sums are float32. What stays for the backward pass is x^T in E4M3 (a byte
per number and a scale per 128 of them, where bfloat16 takes two bytes, though layers that share an x could share that)
and the weight itself, which takes no memory of its own and may be given back until then, as FSDP2 does: it is quantised
again, for a pass over N K numbers.

Shapes: M rows of the input (tokens), K inputs, N outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_kernels.fp8 import Quantised, Scales
from lit_kernels.gemm import ALIGNED, gemm
from lit_kernels.quantise import quantise_blocks, quantise_both, quantise_rows


def unsupported(N: int, K: int) -> str:
    """Why a weight (N, K) cannot be one of FP8; empty if it can."""
    if N and K and not (N % ALIGNED or K % ALIGNED):
        return ""
    return f"{N} x {K} is no multiple of {ALIGNED} in both"


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    kind: Scales = "float",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x w^T + bias, (..., N), and its gradients.

    Args:
        x: (..., K), any number of rows.
        weight: (N, K); its gradient has its dtype, rounded once.
        backend: of the products, as `gemm` has it: "auto", "torch", "triton"; or "emulate", which computes the same
            numbers anywhere and is slower than no FP8.
        kind: of the scales, "float" or "power of two".
        dtype: of y; None: autocast's where that is on, else x's.

    Raises:
        UnsupportedError: the products cannot run here.
        ValueError: N or K is no multiple of 16, or does not fit.

    Example::

        y = fp8_linear(x, layer.weight, layer.bias)
    """
    N, K = weight.shape
    if reason := unsupported(N, K):
        raise ValueError(f"fp8_linear got a weight (N, K) of which {reason}. Type torch.nn.functional.linear")
    if x.shape[-1] != K:
        raise ValueError(f"fp8_linear got x {tuple(x.shape)} and a weight {(N, K)}; valid: (..., {K})")
    if dtype is None:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows_MK = x.reshape(-1, K)
    M = len(rows_MK)
    padding = 0 if backend == "emulate" else -M % ALIGNED  # of dw the M are what is summed over
    y_MN = _Linear.apply(F.pad(rows_MK, (0, 0, 0, padding)) if padding else rows_MK, weight, dtype, backend, kind)
    if padding:
        y_MN = y_MN[:M]
    y = y_MN if x.dim() == 2 else y_MN.reshape(*x.shape[:-1], N)  # no view where none is needed: FSDP2 warns of them
    return y if bias is None else y + bias.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, dtype: torch.dtype, backend: str, kind: Scales) -> Tensor:
        ctx.settings = x_MK.dtype, backend, kind
        x, x_t = _quantised(x_MK, kind, backend, ctx.needs_input_grad[1])
        ctx.save_for_backward(w_NK, *(x_t or ()))
        w = quantise_blocks(w_NK.contiguous(), kind, _of_quantising(backend))
        return _product(x, w, dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        w_NK, *x_t = ctx.saved_tensors
        x_dtype, backend, kind = ctx.settings
        grad, grad_t = _quantised(grad_MN, kind, backend, ctx.needs_input_grad[1])
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            w_t = quantise_blocks(w_NK.contiguous(), kind, _of_quantising(backend), transposed=True)
            grad_x = _product(grad, w_t, x_dtype, backend)
        if grad_t is not None:
            grad_w = _product(grad_t, Quantised(*x_t), w_NK.dtype, backend)
        return grad_x, grad_w, None, None, None


def _quantised(x_MK: Tensor, kind: Scales, backend: str, both: bool) -> tuple[Quantised, Quantised | None]:
    """Rows of x, and rows of x^T if a weight's gradient will need them."""
    x_MK, backend = x_MK.contiguous(), _of_quantising(backend)
    return quantise_both(x_MK, kind, backend) if both else (quantise_rows(x_MK, kind, backend), None)


def _of_quantising(backend: str) -> str:
    return "torch" if backend == "emulate" else backend


def _product(a: Quantised, b: Quantised, dtype: torch.dtype, backend: str) -> Tensor:
    if not a.values.shape[1]:  # no tokens: a gradient of zeros
        return a.values.new_zeros(len(a.values), len(b.values), dtype=dtype)
    return gemm(a, b, dtype, backend)
