"""The small layers that every block uses: RMSNorm and SwiGLU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension (1910.07467), computed in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        if torch.is_grad_enabled():
            return cast(Tensor, _RMSNorm.apply(x, self.weight, self.eps, dtype))
        return _unit_rms(x, self.eps)[0].mul_(self.weight).to(dtype)


def _unit_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x) with a last dimension of 1."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale if wide is x else wide.mul_(scale)), scale


class _RMSNorm(torch.autograd.Function):
    """The same with its gradient by hand: on a CPU a third of the time that autograd takes over the pieces. First
    derivatives only, and not under `torch.func`.

    With n = x / rms, y = n g and D the width:  dx = (dy g - n <dy g, n> / D) / rms,  dg = sum over rows of dy n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        unit, scale = _unit_rms(x, eps)
        ctx.save_for_backward(unit, scale, gain_D)
        ctx.dtype = x.dtype
        return (unit * gain_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        unit, scale, gain_D = ctx.saved_tensors
        grad = grad.to(unit.dtype)
        grad_unit = grad * unit
        projection = (grad_unit @ gain_D.to(unit.dtype)).unsqueeze(-1).div_(-gain_D.numel())
        grad_x = torch.addcmul(grad * gain_D, unit, projection).mul_(scale)
        return grad_x.to(ctx.dtype), grad_unit.reshape(-1, gain_D.numel()).sum(0).to(gain_D.dtype), None, None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (2002.05202). Gate and up are the two halves of one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half over the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` run: autocast's if it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
