"""The small layers that every block uses: RMSNorm and SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension (1910.07467), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(compute_dtype(x))


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


def round_up(n: int) -> int:
    """n rounded up to one of 8 sizes per octave, 16 at least.

    The CPU's matrix library compiles a kernel for every new shape (about a millisecond and some memory each), so row
    counts that change at every call must fall on few values.
    """
    step = max(16, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step
