"""x / sqrt(mean(x^2) + eps) * gain over the last dimension (RMSNorm, 1910.07467), and its rows in FP8 in one pass.

Computed in float32 and rounded once, to x's dtype: transformers rounds before it multiplies by the gain, too. The FP8
form rounds to that dtype first, so that it is quantise(rms_norm(x)).

Shapes: M rows, D columns."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kernels.dispatch import UnsupportedError, choose
from lit_kernels.fp8 import BLOCK, E4M3, Quantised, Scales, quantise_rows_reference

WIDEST = 8192  # columns: a program keeps a row in registers; a backward keeps three, and spills at twice that


def rms_norm_reference(x: Tensor, gain_D: Tensor, eps: float = 1e-6) -> Tensor:
    """(..., D) -> (..., D)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain_D.float()).to(x.dtype)


def rms_norm_quantised_reference(x_MD: Tensor, gain_D: Tensor, eps: float = 1e-6, kind: Scales = "float") -> Quantised:
    """(M, D) -> rows (M, D)."""
    return quantise_rows_reference(rms_norm_reference(x_MD, gain_D, eps), kind)


def rms_norm(x: Tensor, gain_D: Tensor, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """(..., D) -> (..., D) of x's dtype; the gradient of the gain is summed in float32 and in a fixed order.

    Raises:
        ValueError: the gain is not (D,).
        UnsupportedError: Triton was asked for a D above 8192.
    """
    shape = _checked(x, gain_D)
    if _backend(backend, x, shape) == "torch":
        return rms_norm_reference(x, gain_D, eps)
    return _rms_norm(x.reshape(shape), gain_D, eps).view(x.shape)


@torch.no_grad()
def rms_norm_quantised(
    x_MD: Tensor, gain_D: Tensor, eps: float = 1e-6, kind: Scales = "float", backend: str = "auto"
) -> Quantised:
    """Rows (M, D) of `rms_norm`; no gradient. Raises what that does, and ValueError for other than two dimensions."""
    if x_MD.dim() != 2:
        raise ValueError(f"x has shape {tuple(x_MD.shape)}; valid: (M, D). Type x.flatten(0, -2)")
    if _backend(backend, x_MD, _checked(x_MD, gain_D), fp8=True) == "torch":
        return rms_norm_quantised_reference(x_MD, gain_D, eps, kind)
    return Quantised(*_rms_norm_quantised(x_MD, gain_D, eps, kind))


def _checked(x: Tensor, gain_D: Tensor) -> tuple[int, int]:
    D = x.shape[-1]
    if gain_D.shape != (D,):
        raise ValueError(f"the gain has shape {tuple(gain_D.shape)} and x {tuple(x.shape)}; valid: ({D},)")
    return x.shape[:-1].numel(), D


def _backend(backend: str, x: Tensor, shape: tuple[int, int], fp8: bool = False) -> str:
    if shape[1] <= WIDEST:
        return choose("rms_norm", backend, x.device, shape, fp8).backend
    if backend == "triton":
        raise UnsupportedError(f"D={shape[1]}; valid for Triton: up to {WIDEST}. Type backend='auto' or 'torch'")
    return choose("rms_norm", "torch" if backend == "auto" else backend, x.device, shape, fp8).backend


@torch.library.custom_op("lit_kernels::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    from lit_kernels.gpu import rms_norm

    return rms_norm.rms_norm(x, gain, eps)


@_rms_norm.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lit_kernels::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from lit_kernels.gpu import rms_norm

    return rms_norm.rms_norm_backward(grad, x, gain, eps)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gain.new_empty(gain.shape)


def _save(ctx, inputs, output) -> None:
    x, gain, ctx.eps = inputs
    ctx.save_for_backward(x, gain)


_rms_norm.register_autograd(
    lambda ctx, grad: (*_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None), setup_context=_save
)


@torch.library.custom_op("lit_kernels::rms_norm_quantised", mutates_args=())
def _rms_norm_quantised(x: Tensor, gain: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    from lit_kernels.gpu import rms_norm

    return rms_norm.rms_norm_quantised(x, gain, eps, kind == "power of two")


@_rms_norm_quantised.register_fake
def _(x: Tensor, gain: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    M, D = x.shape
    return x.new_empty(M, D, dtype=E4M3), x.new_empty((D + BLOCK - 1) // BLOCK, M, dtype=torch.float32).t()
