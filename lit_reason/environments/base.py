"""The environment protocol: what answers to a completion while it is being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from lit_reason.types import Prompt


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy wrote in one turn.

    Args:
        text: decoded, without the stop token.
        finish_reason: `"stop"` for a stop token or where `Environment.asks` cut it, `"length"` at a limit.
    """

    text: str
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Step:
    """What the environment answers to a turn.

    Args:
        state: handed to the row's next step.
        observation: what the policy reads next; None when the episode is over.
        role: `"tool"`, read in the middle of the policy's own text, or `"user"`, a new message after its stop token.
        fault: why the environment failed on this row, `""` if it did not. The row ends and is never scored: an error
            of ours must not look like a mistake of the policy, nor like an empty answer.
    """

    state: Any
    observation: str | None = None
    role: Literal["tool", "user"] = "tool"
    fault: str = ""


@runtime_checkable
class Environment(Protocol):
    """Knows no row: what it must remember of one travels in that row's state, so any number may be in flight.

    Both methods take all rows of a turn at once, so that an environment can work on them side by side.
    """

    max_turns: int

    def reset(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Any]:
        """A first state per row. Rows of a group have the same prompt and different seeds."""
        ...

    def asks(self, text: str) -> bool:
        """Whether a turn that has come so far waits for an answer: what the engine generated after that is dropped.

        Once true of a text, it must be true of all that begin with it.
        """
        ...

    def step(self, states: Sequence[Any], turns: Sequence[Turn]) -> list[Step]:
        """The answer to each turn, in order; also asked where a limit leaves no room to read it."""
        ...
