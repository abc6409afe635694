"""What is done to the verified columns before anything is normalised: scale, then clip, then conditions.

B sequences   R rewards
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_reason.errors import ConfigError, RewardError, nearest
from lit_reason.types import RewardState, Scores

TYPED = {
    "scale": "'rubric.scale={length: 0.5}'",
    "clip": "'rubric.clip={length: [0.0, 1.0]}'",
    "conditions": "'rubric.conditions={length: {on: answer, at_least: 1.0}}'",
}


def conditioned(reward_B: Tensor, on_B: Tensor, at_least: float) -> Tensor:
    """The reward where another column reaches `at_least`, else 0; NaN where either is (GDPO, arXiv 2601.05242 eq. 8).

    Trap: before any normalisation. Zeroed afterwards, a wrong short answer would still raise the others' baseline.
    Trap: 0 is the *best* value of a punishment (`overlong`: 0 to -1), so a wrong long answer would go free.
    """
    kept_B = reward_B.where(on_B >= at_least, torch.zeros_like(reward_B))
    return kept_B.masked_fill(reward_B.isnan() | on_B.isnan(), torch.nan)


class Condition(NamedTuple):
    """A column counts where the column `on` reaches `at_least`."""

    on: str
    at_least: float


class Transforms:
    """Scale, clip and condition columns by name.

    A condition looks at the other column as its verifier gave it: neither scaled nor clipped nor itself conditioned.
    So their order does not matter, and in "length hangs on format, format on answer" a well-formed wrong answer keeps
    its length reward.

    Args:
        names: the rubric's columns.
        scale: name -> factor.
        clip: name -> [low, high], of the scaled value.
        conditions: name -> `{"on": other, "at_least": t}`; elsewhere the column is 0, whatever `clip` says.
    """

    def __init__(
        self,
        names: Collection[str],
        scale: Mapping[str, float] | None = None,
        clip: Mapping[str, Sequence[float]] | None = None,
        conditions: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.scale = {
            name: _number(factor, f"rubric.scale.{name}") for name, factor in _by_name("scale", scale, names).items()
        }
        self.clip = {name: _bounds(name, pair) for name, pair in _by_name("clip", clip, names).items()}
        self.conditions = {
            name: _condition(name, condition, names)
            for name, condition in _by_name("conditions", conditions, names).items()
        }

    def __call__(self, scores: Scores) -> Scores:
        """The transformed scores; the entry of a column whose condition has no verdict gets that column's state.

        Raises:
            RewardError: a factor made a value infinite.
        """
        if not (self.scale or self.clip or self.conditions):
            return scores
        column = {name: i for i, name in enumerate(scores.names)}
        values_BR, states_BR, messages = scores.values_BR.clone(), scores.states_BR.clone(), dict(scores.messages)
        for name, factor in self.scale.items():
            values_BR[:, column[name]] *= factor
        for name, (low, high) in self.clip.items():
            values_BR[:, column[name]] = values_BR[:, column[name]].clamp(low, high)
        for name, (on, at_least) in self.conditions.items():
            at, other = column[name], column[on]
            values_BR[:, at] = conditioned(values_BR[:, at], scores.values_BR[:, other], at_least)
            unknown_B = (scores.states_BR[:, other] != RewardState.OK) & (scores.states_BR[:, at] == RewardState.OK)
            states_BR[unknown_B, at] = scores.states_BR[unknown_B, other]
            for row in unknown_B.nonzero().flatten().tolist():
                messages[row, name] = f"its condition {on!r} failed: {scores.messages.get((row, on), '')}"
        for name in self.scale:
            if values_BR[:, column[name]].isinf().any():
                raise RewardError(
                    f"rubric.scale.{name}={self.scale[name]} makes a value infinite (float32); type a smaller factor"
                )
        return replace(scores, values_BR=values_BR, states_BR=states_BR, messages=messages)


def _by_name(kind: str, given: Any, names: Collection[str]) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rubric.{kind}={given!r}; valid: a mapping from reward names. Type e.g. {TYPED[kind]}")
    for name in given:
        if name not in names:
            raise ConfigError(f"rubric.{kind}.{name}: there is no reward {name!r}: {nearest(str(name), names)}")
    return given


def _number(value: Any, key: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}; valid: a finite number, e.g. {key}=1.0")
    return float(value)


def _bounds(name: str, pair: Any) -> tuple[float, float]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise ConfigError(f"rubric.clip.{name}={pair!r}; valid: [low, high]. Type e.g. {TYPED['clip']}")
    low, high = (_number(value, f"rubric.clip.{name}[{i}]") for i, value in enumerate(pair))
    if low > high:
        raise ConfigError(f"rubric.clip.{name}={pair!r}; valid: low <= high. Type 'rubric.clip.{name}=[{high},{low}]'")
    return low, high


def _condition(name: str, given: Any, names: Collection[str]) -> Condition:
    key = f"rubric.conditions.{name}"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}={given!r}; valid: {{on: NAME, at_least: NUMBER}}. Type e.g. {TYPED['conditions']}")
    plain = {
        "on" if part is True else str(part): value for part, value in given.items()
    }  # YAML reads a bare on as true
    for part in plain:
        if part not in Condition._fields:
            raise ConfigError(f"unknown key {key}.{part}: {nearest(part, Condition._fields)}")
    for part in Condition._fields:
        if part not in plain:
            raise ConfigError(f"{key} lacks {part!r}. Type e.g. {TYPED['conditions']}")
    on = plain["on"]
    if on not in names:
        raise ConfigError(f"{key}.on={on!r}: there is no reward {on!r}: {nearest(str(on), names)}")
    if on == name:
        raise ConfigError(f"{key}.on={on!r}: a reward cannot hang on itself; {nearest('', set(names) - {name})}")
    return Condition(on, _number(plain["at_least"], f"{key}.at_least"))
