"""The rubric: named rewards, one column each; faults are counted states, and too many of them stop the run."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch

from lit_reason.errors import ConfigError, RewardError, nearest
from lit_reason.rewards.base import FAULTS, Reward, RewardFault, fault_of
from lit_reason.rewards.transforms import Transforms
from lit_reason.types import Completion, Prompt, RewardState, Scores

log = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float32).max


class Rubric:
    """Scores completions with every reward and keeps the columns apart.

    Example::

        >>> rubric = Rubric({"answer": AnswerExact(), "format": FormatExact(weight=0.2)})
        >>> scores = rubric.score(prompts, completions)
        >>> scores.names, scores.weights_R
        (('answer', 'format'), tensor([1.0000, 0.2000]))

    From the command line: `'rubric.conditions={length: {on: answer, at_least: 1.0}}'`.

    Args:
        rewards: name -> reward, in the order of the columns.
        weights: overrides of the rewards' own `weight`, by name.
        max_fault_fraction: `score` raises when more than this fraction of one column's entries is not OK.
        slow_s: after so many seconds inside one reward a warning names it; a reward that hangs must not look like a
            run that is slow.
        scale, clip, conditions: what happens to verified columns, in this order and before anything is normalised
            (`Transforms`): a factor, `[low, high]`, and `{"on": other, "at_least": t}` (0 where the other column is
            below t: GDPO's conditioned reward). Faults are counted before. `gdpo` divides a factor out again: there
            a weight is what tells.

    Attributes:
        scored: completions scored so far, over all calls.
        faults: `{name: {"ERROR": n, "TIMEOUT": n}}` so far, over all calls.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        max_fault_fraction: float = 0.01,
        slow_s: float = 60.0,
        scale: Mapping[str, float] | None = None,
        clip: Mapping[str, Sequence[float]] | None = None,
        conditions: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if not rewards:
            raise ConfigError("got no reward; valid: at least one, type e.g. 'reward=[answer,format]'")
        for name, reward in rewards.items():
            if not callable(reward) or not isinstance(getattr(reward, "weight", None), Real):
                raise ConfigError(
                    f"the reward {name!r} is a {type(reward).__name__}, which is no reward; valid: an object with "
                    "`weight: float` and `__call__(prompts, completions) -> list of floats` (lit_reason.rewards.Reward)"
                )
        for name in weights or {}:
            if name not in rewards:
                raise ConfigError(f"a weight is given for the unknown reward {name!r}: {nearest(name, rewards)}")
        self.rewards = dict(rewards)
        self.weights = {name: float((weights or {}).get(name, reward.weight)) for name, reward in rewards.items()}
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ConfigError(f"got weight {weight} for the reward {name!r}; valid: a finite number")
        if not 0 <= max_fault_fraction <= 1:
            raise ConfigError(f"rubric.max_fault_fraction={max_fault_fraction}; valid: a number from 0 to 1, e.g. 0.01")
        self.max_fault_fraction, self.slow_s = max_fault_fraction, slow_s
        self.transforms = Transforms(self.rewards, scale, clip, conditions)
        self.scored = 0
        self.faults = {name: {"ERROR": 0, "TIMEOUT": 0} for name in rewards}

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        """The B x R scores of B (prompt, completion) pairs; raises `RewardError` when too many entries are faults."""
        scores = self.judge(prompts, completions)
        self.check(scores)
        return scores

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        """The same without a limit on faults, for one part of a whole that `check` looks at."""
        _check_pairs(prompts, completions)
        values_BR = torch.full((len(prompts), len(self.rewards)), float("nan"), dtype=torch.float32)
        states_BR = torch.full(values_BR.shape, int(RewardState.OK), dtype=torch.int64)
        messages: dict[tuple[int, str], str] = {}
        for column, (name, reward) in enumerate(self.rewards.items()):
            with _watched(name, len(prompts), self.slow_s):
                entries = _call(reward, prompts, completions)
            entries = [  # what an environment that failed has left is no completion to judge
                RewardFault(RewardState.ERROR, f"environment: {completion.fault}") if completion.fault else entry
                for completion, entry in zip(completions, entries, strict=True)
            ]
            for row, entry in enumerate(entries):
                if isinstance(entry, RewardFault):
                    states_BR[row, column] = int(entry.state)
                    messages[row, name] = entry.message
                    self.faults[name][entry.state.name] += 1
                else:
                    values_BR[row, column] = entry
        self.scored += len(prompts)
        weights_R = torch.tensor(list(self.weights.values()), dtype=torch.float32)
        return self.transforms(Scores(tuple(self.rewards), weights_R, values_BR, states_BR, messages))

    def check(self, scores: Scores) -> None:
        """Raises `RewardError` when too many entries of one column are faults."""
        rows = len(scores.values_BR)
        for name in self.rewards:
            texts = [text for (_, of), text in scores.messages.items() if of == name]
            if len(texts) > self.max_fault_fraction * rows:
                raise RewardError(
                    f"reward {name!r} failed on {len(texts)} of {rows} completions "
                    f"(allowed: {self.max_fault_fraction:.1%}); the first: {texts[0]}. Fix the reward or the data, "
                    "or type a larger rubric.max_fault_fraction"
                )


@contextmanager
def _watched(name: str, rows: int, slow_s: float) -> Iterator[None]:
    message = "reward %r has been judging %d completions for %g s; if it hangs, stop the run with Ctrl-C, twice"
    timer = threading.Timer(slow_s, log.warning, (message, name, rows, slow_s))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_pairs(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
    if len(prompts) != len(completions):
        raise RewardError(f"got {len(prompts)} prompts and {len(completions)} completions; pass one prompt for each")
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if prompt.id != completion.prompt_id:
            raise RewardError(f"row {row}: the completion belongs to prompt {completion.prompt_id}, not {prompt.id}")


def _call(reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | RewardFault]:
    try:
        entries = list(reward(prompts, completions))
    except FAULTS as error:  # whatever it is, it becomes a counted state of these rows
        return [fault_of(error)] * len(prompts)
    if len(entries) != len(prompts):
        message = f"the reward returned {len(entries)} entries for {len(prompts)} completions"
        return [RewardFault(RewardState.ERROR, message)] * len(prompts)
    return [_checked(entry) for entry in entries]


def _checked(entry: object) -> float | RewardFault:
    if isinstance(entry, RewardFault):
        if not isinstance(entry.state, RewardState) or entry.state is RewardState.OK:
            message = f"the reward returned a fault with the state {entry.state!r}: {entry.message}"
            return RewardFault(RewardState.ERROR, message)
        return entry
    if not isinstance(entry, Real):
        return RewardFault(RewardState.ERROR, f"the reward returned {entry!r:.100}; valid: a float or a RewardFault")
    try:
        value = float(entry)
    except OverflowError as error:
        return fault_of(error)
    return value if abs(value) <= LARGEST else RewardFault(RewardState.ERROR, f"the reward returned {value}")
