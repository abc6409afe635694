"""Rotary position embedding on interleaved pairs, with YaRN. Shapes: T positions, R = qk_rope_head_dim."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_reason.models.config import ModelConfig, Yarn


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, each (max_seq_len, R/2) float32, of the angle position * inv_freq (RoFormer, 2104.09864)."""
    half = config.qk_rope_head_dim // 2
    inv_freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    gain = 1.0
    if config.yarn is not None:
        inv_freq = _yarn_inv_freq(inv_freq, config.rope_theta, config.yarn)
        gain = _mscale(config.yarn, config.yarn.mscale) / _mscale(config.yarn, config.yarn.mscale_all_dim)
    angle_TR = torch.arange(config.max_seq_len, dtype=torch.float64)[:, None] * inv_freq
    return (angle_TR.cos() * gain).float(), (angle_TR.sin() * gain).float()


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(qk head dim), times YaRN's temperature squared. Head dims are fixed under muP, so no 1/d here."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None:
        scale *= _mscale(config.yarn, config.yarn.mscale_all_dim) ** 2
    return scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... and returns them de-interleaved: first parts, then second.

    The order of the output's dimensions is a permutation that queries and keys share, so scores are unchanged.

    Args:
        x: (..., R).
        cos, sin: broadcastable to (..., R/2).
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _mscale(yarn: Yarn, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


def _yarn_inv_freq(inv_freq: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """Interpolates slow dimensions by `factor`, keeps fast ones, with a linear ramp between (2309.00071 eq. 23)."""
    half = inv_freq.numel()

    def dimension_of(rotations: float) -> float:
        return half * math.log(yarn.original_max_seq_len / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / yarn.factor * ramp + inv_freq * (1 - ramp)
