"""Accuracy over questions, each number with a 95% interval that is clustered by question.

    P  questions (distinct prompt ids)        G  samples of one question        k  the k of pass@k, k <= G

Samples of one question are correlated, so the question is the unit everywhere: first one value per question, then a
mean over questions and an interval from the spread *between* questions.

The interval is Wilson's score interval with the clustered effective number of questions n_eff = p(1-p) / (s^2/P), where
s^2 is the variance (ddof 0) of the per-question values. For 0/1 values (greedy pass@1) n_eff is exactly P, so this *is*
the plain Wilson interval; for averages over samples it is the design-effect form of it. Unlike the normal approximation
it stays inside [0, 1] and keeps a width at 0% and at 100%.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_reason.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions.

    Args:
        value: the point estimate.
        low, high: the 95% interval (or whatever `confidence` was asked for).
        n: the number of distinct questions behind it.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def ci(self) -> tuple[float, float]:
        return (self.low, self.high)

    def disjoint(self, other: Estimate) -> bool:
        """Whether the two intervals share no point."""
        return self.high < other.low or other.high < self.low

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence} must lie between 0 and 1; type confidence=0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(p: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score interval for a proportion `p` of `n` independent trials; `n` need not be whole."""
    z = _z(confidence)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # rounding may leave 1e-17 outside of the point itself
    return min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)


def proportion(values_P: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of per-question values in [0, 1] with the clustered Wilson interval of the module's docstring.

    Example::

        >>> print(proportion([1, 1, 0, 1]))
        0.750 [0.301, 0.954] (n=4)
    """
    x_P = np.asarray(values_P, dtype=np.float64)
    if x_P.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if x_P.min() < 0 or x_P.max() > 1:
        raise ConfigError(
            f"proportion() got values in [{x_P.min()}, {x_P.max()}], valid: [0, 1]; use mean() for rewards"
        )
    p, variance = float(x_P.mean()), float(x_P.var())
    # no spread at all says nothing about the spread: fall back on one trial per question, the cautious end
    n_eff = p * (1 - p) / variance * x_P.size if variance > 1e-12 else float(x_P.size)
    return Estimate(p, *wilson_interval(p, n_eff, confidence), x_P.size)


def mean(values_P: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of unbounded per-question values (rewards, lengths), clustered central-limit interval (s with ddof 1)."""
    x_P = np.asarray(values_P, dtype=np.float64)
    if x_P.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(x_P.mean())
    half = _z(confidence) * float(x_P.std(ddof=1)) / math.sqrt(x_P.size) if x_P.size > 1 else math.inf
    return Estimate(value, value - half, value + half, x_P.size)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of one question: 1 - C(n-c, k) / C(n, k)  (Chen et al., arXiv 2107.03374, eq. 1).

    As the product prod_{i=n-c+1..n} (1 - k/i), which neither overflows nor cancels.

    Args:
        n: samples of the question.
        c: correct ones among them.
        k: 1 <= k <= n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ConfigError(f"pass_at_k got n={n} samples, c={c} correct, k={k}; valid: 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")


def normalise_answer(text: str) -> str:
    """The form in which two answers count as the same vote.

    Case, spaces, a final full stop, thousands commas, a leading plus, leading zeros and trailing decimal zeros are
    dropped. Nothing is ever evaluated.

    Example::

        >>> [normalise_answer(a) for a in (" 1,204.50 ", "+007", "-0", "X = 3.")]
        ['1204.5', '7', '0', 'x=3']
    """
    short = "".join(text.split()).casefold().removesuffix(".")
    bare = re.sub(r",(?=\d{3}(\D|$))", "", short)
    if not _NUMBER.fullmatch(bare):
        return short
    try:
        number = Decimal(bare)
    except InvalidOperation:
        return short
    digits = format(number, "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return digits if number else "0"


def majority(answers_G: Sequence[str | None], correct_G: Sequence[bool]) -> float:
    """maj@G of one question: is the answer with the most votes the right one?

    Votes are counted over `normalise_answer`. A completion without an answer (None or empty) abstains; if all abstain
    the value is 0. When several answers tie for the most votes the value is the fraction of them that are right: the
    expectation of breaking the tie at random, with no dependence on the order of the samples. Should samples with the
    same normalised answer be judged differently (e.g. by format), the answer counts with their mean.

    Example::

        >>> majority(["4", "4.0", "5", None], [True, True, False, False])
        1.0
        >>> majority(["4", "5"], [True, False])
        0.5
    """
    votes: dict[str, list[bool]] = {}
    for answer, correct in zip(answers_G, correct_G, strict=True):
        if answer is not None and (key := normalise_answer(answer)):
            votes.setdefault(key, []).append(bool(correct))
    if not votes:
        return 0.0
    most = max(len(judged) for judged in votes.values())
    tied = [sum(judged) / len(judged) for judged in votes.values() if len(judged) == most]
    return sum(tied) / len(tied)


def by_question(ids: Sequence[str], values: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """`{question id: its values}`, questions in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for id_, value in zip(ids, np.asarray(values, dtype=np.float64), strict=True):
        groups.setdefault(id_, []).append(float(value))
    return {id_: np.array(group) for id_, group in groups.items()}


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """after - before on the same questions.

    Args:
        value: mean over questions of (after - before).
        low, high: its interval.
        n: questions in both.
        verdict: `"better"` or `"worse"` when the interval lies on one side of 0, else `"no difference shown"`.
    """

    value: float
    low: float
    high: float
    n: int
    verdict: str


def paired_difference(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    scale: float = 1.0,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Mean difference between two runs on the same questions, percentile bootstrap over questions.

    Two pseudo-questions with differences +scale and -scale take part in every resample (Bonett and Price, 2012, for
    paired proportions): without them a handful of questions that all moved the same way, or none that moved, would give
    an interval of width 0. At hundreds of questions they are invisible.

    Args:
        before, after: `{question id: value}`; the ids must be the same.
        scale: the largest difference that is possible, 1 for accuracies.
        resamples, seed: of the bootstrap; the same seed gives the same interval.
    """
    if set(before) != set(after) or not before:
        only_before, only_after = len(set(before) - set(after)), len(set(after) - set(before))
        raise DataError(
            f"paired_difference needs the same questions on both sides: {len(before)} before, {len(after)} after, "
            f"{only_before} only before, {only_after} only after; evaluate both runs on the same prompts"
        )
    d_P = np.array([after[id_] - before[id_] for id_ in sorted(before)], dtype=np.float64)
    padded = np.concatenate([d_P, [scale, -scale]])
    rng = np.random.default_rng(seed)
    draws = [padded[rng.integers(padded.size, size=(500, padded.size))].mean(1) for _ in range(-(-resamples // 500))]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws)[:resamples], [tail, 1 - tail])
    value = float(d_P.mean())
    low, high = min(float(low), value), max(float(high), value)
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return PairedDifference(value, low, high, d_P.size, verdict)
