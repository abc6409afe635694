"""What a reward is, and the helpers that the verifiers share.

A reward is any object with a `weight` that maps prompts and completions, pair by pair, to floats or faults:

    class Cheerful:
        weight = 0.1
        def __call__(self, prompts, completions):
            return [float("!" in c.text) for c in completions]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lit_reason.errors import ConfigError
from lit_reason.types import Completion, Prompt, RewardState

# What a verifier may raise and still cost no more than its rows: also sys.exit, which would end the run with code 0.
FAULTS = (Exception, SystemExit)


@dataclass(frozen=True, slots=True)
class RewardFault:
    """ "No score": why a verifier could not judge a completion. Never a 0.

    Args:
        state: `RewardState.ERROR` or `RewardState.TIMEOUT`.
        message: one line for the log.
    """

    state: RewardState
    message: str


@runtime_checkable
class Reward(Protocol):
    """One column of the rubric."""

    weight: float

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | RewardFault]:
        """One entry per (prompt, completion) pair, in their order."""
        ...


class ItemReward(ABC):
    """Base of verifiers that judge one completion at a time; an exception costs only its own row.

    Args:
        weight: the column's weight in the total.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = float(weight)

    @abstractmethod
    def score(self, prompt: Prompt, completion: Completion) -> float | RewardFault:
        """The score of one completion."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | RewardFault]:
        return [self._guarded(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def _guarded(self, prompt: Prompt, completion: Completion) -> float | RewardFault:
        try:
            return self.score(prompt, completion)
        except FAULTS as error:  # whatever it is, it becomes a counted state
            return fault_of(error)


def fault_of(error: BaseException) -> RewardFault:
    """The ERROR state for an exception."""
    return RewardFault(RewardState.ERROR, f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Tags:
    """The four tags of a completion, in their order; the defaults are those of `ChatTemplate`."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    answer_open: str = "<answer>"
    answer_close: str = "</answer>"

    def __post_init__(self) -> None:
        if "" in self.all or len(set(self.all)) < 4:
            raise ConfigError(f"got the tags {self.all}; valid: four different, non-empty texts")

    @property
    def all(self) -> tuple[str, str, str, str]:
        return self.think_open, self.think_close, self.answer_open, self.answer_close

    def answer(self, text: str) -> str | None:
        """The text inside the answer tags; None unless each of the two occurs exactly once, in order."""
        if text.count(self.answer_open) != 1 or text.count(self.answer_close) != 1:
            return None
        start, end = text.index(self.answer_open) + len(self.answer_open), text.index(self.answer_close)
        return text[start:end] if start <= end else None

    def last_answer(self, text: str) -> str | None:
        """The text inside the last complete pair of answer tags, however often they occur; None without a pair."""
        end = text.rfind(self.answer_close)
        start = text.rfind(self.answer_open, 0, end) if end >= 0 else -1
        return text[start + len(self.answer_open) : end] if start >= 0 else None
