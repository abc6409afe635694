"""Rotary position embedding on interleaved pairs, with YaRN. Shapes: T positions, R = qk_rope_head_dim."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_reason.models.config import ModelConfig, Yarn

_TABLES: dict[tuple[ModelConfig, torch.device], Tensor] = {}


def rope_table(config: ModelConfig, device: torch.device) -> Tensor:
    """e^(i angle), (max_seq_len, R/2) complex64, of the angle position * inv_freq (RoFormer, 2104.09864).

    Kept per config and device outside the module: as a buffer, `.to(bfloat16)` would round the angles.
    """
    if (config, device) not in _TABLES:
        with torch.inference_mode(False):  # a table first used in generation serves training, too
            table = _rope_table(config).to(device)
        if type(table) is not Tensor:  # a tracer's stand-in must not stay
            return table
        _TABLES[config, device] = table
    return _TABLES[config, device]


def _rope_table(config: ModelConfig) -> Tensor:
    half = config.qk_rope_head_dim // 2
    inv_freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
    gain = 1.0
    if config.yarn is not None:
        inv_freq = _yarn_inv_freq(inv_freq, config.rope_theta, config.yarn)
        gain = _mscale(config.yarn, config.yarn.mscale) / _mscale(config.yarn, config.yarn.mscale_all_dim)
    angle_TR = torch.arange(config.max_seq_len, dtype=torch.float64, device="cpu")[:, None] * inv_freq
    return torch.polar(torch.full_like(angle_TR, gain), angle_TR).to(torch.complex64)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(qk head dim), times YaRN's temperature squared. Head dims are fixed under muP, so no 1/d here."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None:
        scale *= _mscale(config.yarn, config.yarn.mscale_all_dim) ** 2
    return scale


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the interleaved pairs (x0, x1), (x2, x3), ... as complex numbers, in float32 at least.

    Args:
        x: (..., R).
        rotation: rows of `rope_table`, broadcastable to (..., R/2).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def _mscale(yarn: Yarn, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


def _yarn_inv_freq(inv_freq: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """Interpolates slow dimensions by `factor`, keeps fast ones, with a linear ramp between (2309.00071 eq. 23)."""
    half = inv_freq.numel()

    def dimension_of(rotations: float) -> float:
        return half * math.log(yarn.original_max_seq_len / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / yarn.factor * ramp + inv_freq * (1 - ramp)
