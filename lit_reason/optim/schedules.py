"""Schedules as factors on every group's own learning rate: a schedule that sets the rate would erase muP's."""

from __future__ import annotations

import math
from collections.abc import Callable

from lit_reason.errors import ConfigError, nearest


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SHAPES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def schedule(shape: str, *, warmup_steps: int, total_steps: int, final_fraction: float) -> Callable[[int], float]:
    """step -> factor: a linear warm-up from 1/warmup_steps, then `shape` down to `final_fraction` at `total_steps`.

    Raises:
        ConfigError: for an unknown shape, or a warm-up that is not shorter than the run.
    """
    if shape not in SHAPES:
        raise ConfigError(f"optimizer.schedule={shape!r}: {nearest(shape, SHAPES)}")
    if total_steps > 0 and warmup_steps >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup_steps} leaves no step of the run's {total_steps}: "
            f"type optimizer.warmup_steps={max(total_steps // 10, 0)}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return final_fraction + (1 - final_fraction) * SHAPES[shape](progress)

    return factor
