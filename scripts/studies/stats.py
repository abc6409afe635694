"""Means over seeds with 95% intervals. The seed is the unit: one number each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# The 0.975 quantiles of Student's t with 1 .. 10 degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class Interval(NamedTuple):
    """A mean over seeds and the ends of its 95% interval; a single seed has none (NaN)."""

    mean: float
    low: float
    high: float

    def text(self, form: str = ".3f") -> str:
        """`0.512 [0.480, 0.544]`."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def t_interval(values: Sequence[float]) -> Interval:
    """mean +- t s / sqrt(n), s the sample standard deviation (ddof 1); of 1 to 11 values."""
    if not 1 <= len(values) <= len(T_975) + 1:
        raise ValueError(f"got {len(values)} values; valid: 1 to {len(T_975) + 1} (more: extend T_975)")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_interval(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval:
    """Of ours - theirs, seed by seed; `{seed: value}` with the same seeds on both sides."""
    if set(ours) != set(theirs):
        raise ValueError(f"got the seeds {sorted(ours)} and {sorted(theirs)}; a paired difference needs the same")
    return t_interval([ours[seed] - theirs[seed] for seed in sorted(ours)])


def verdict(difference: Interval) -> str:
    """`"higher"`, `"lower"`, or `"no difference shown"` when the interval holds 0 or there is none."""
    return "higher" if difference.low > 0 else "lower" if difference.high < 0 else "no difference shown"
