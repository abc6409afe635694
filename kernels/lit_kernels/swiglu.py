"""silu(gate) * up, of a gate and an up that lie side by side (SwiGLU, 2002.05202), and its rows in FP8 in one pass.

Computed in float32 and rounded once, to the input's dtype. The FP8 form rounds to that dtype first too, so that it is
quantise(silu_mul(x)) byte for byte, whether or not the product went through memory in between.

Shapes: M rows, F columns of the result; gate_up has 2F, the gate's first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kernels.dispatch import choose
from lit_kernels.fp8 import BLOCK, E4M3, Quantised, Scales, quantise_rows_reference


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """(..., 2F) -> (..., F)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul_quantised_reference(gate_up_M2F: Tensor, kind: Scales = "float") -> Quantised:
    """(M, 2F) -> rows (M, F)."""
    return quantise_rows_reference(silu_mul_reference(gate_up_M2F), kind)


def silu_mul(gate_up: Tensor, backend: str = "auto") -> Tensor:
    """silu of the first half of the last dimension times the second half, (..., 2F) -> (..., F).

    The Triton form keeps nothing but gate_up for its backward, which reads it once more.

    Raises:
        ValueError: the last dimension is odd.
    """
    M, width = _checked(gate_up)
    if choose("silu_mul", backend, gate_up.device, (M, width)).backend == "torch":
        return silu_mul_reference(gate_up)
    return _silu_mul(gate_up.reshape(M, 2 * width)).view(*gate_up.shape[:-1], width)


@torch.no_grad()
def silu_mul_quantised(gate_up_M2F: Tensor, kind: Scales = "float", backend: str = "auto") -> Quantised:
    """Rows (M, F) of `silu_mul`; no gradient.

    Raises:
        ValueError: the last dimension is odd, or there are more or fewer than two.
    """
    if gate_up_M2F.dim() != 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up_M2F.shape)}; valid: (M, 2F). Type x.flatten(0, -2)")
    if choose("silu_mul", backend, gate_up_M2F.device, _checked(gate_up_M2F), fp8=True).backend == "torch":
        return silu_mul_quantised_reference(gate_up_M2F, kind)
    return Quantised(*_silu_mul_quantised(gate_up_M2F, kind))


def _checked(gate_up: Tensor) -> tuple[int, int]:
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"gate_up has {width} columns; valid: an even number, those of the gate, then those of up")
    return gate_up.shape[:-1].numel(), width // 2


@torch.library.custom_op("lit_kernels::silu_mul", mutates_args=())
def _silu_mul(gate_up: Tensor) -> Tensor:
    from lit_kernels.gpu import swiglu

    return swiglu.silu_mul(gate_up)


@_silu_mul.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


@torch.library.custom_op("lit_kernels::silu_mul_backward", mutates_args=())
def _silu_mul_backward(grad_MF: Tensor, gate_up: Tensor) -> Tensor:
    from lit_kernels.gpu import swiglu

    return swiglu.silu_mul_backward(grad_MF, gate_up)


@_silu_mul_backward.register_fake
def _(grad_MF: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_silu_mul.register_autograd(
    lambda ctx, grad: _silu_mul_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("lit_kernels::silu_mul_quantised", mutates_args=())
def _silu_mul_quantised(gate_up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    from lit_kernels.gpu import swiglu

    return swiglu.silu_mul_quantised(gate_up, kind == "power of two")


@_silu_mul_quantised.register_fake
def _(gate_up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    M, width = len(gate_up), gate_up.shape[1] // 2
    scales_fM = gate_up.new_empty((width + BLOCK - 1) // BLOCK, M, dtype=torch.float32)
    return gate_up.new_empty(M, width, dtype=E4M3), scales_fM.t()
