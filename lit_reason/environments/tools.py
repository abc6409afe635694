"""Tools that a policy calls in its text: `<calculator>12*7</calculator>` is answered by `<result>84</result>`.

The tags are plain text, so every tokenizer can write them. A call ends the turn; a turn without one ends the episode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lit_reason.environments.base import Step, Turn
from lit_reason.errors import ConfigError, LitReasonError
from lit_reason.types import Prompt

_TAKEN = frozenset(["think", "answer", "result"])  # the chat template's own tags


@dataclass(frozen=True, slots=True)
class ToolFault:
    """The tool itself failed: nothing that the policy wrote is to blame."""

    message: str


class Tool(Protocol):
    """Answers requests, all of a turn's at once and in order. A mistake in a request is an answer (`error: ...`)."""

    def __call__(self, requests: Sequence[str]) -> Sequence[str | ToolFault]: ...


class Tools:
    """Answers the first complete call of each turn. Its rows have no state.

    Example::

        >>> tools = Tools({"calculator": Calculator()})
        >>> tools.step([None], [Turn("<calculator>12*7</calculator>", "stop")])
        [Step(state=None, observation='84', role='tool', fault='')]

    Args:
        tools: by the name of their tags: small letters, digits, `_`; not `think`, `answer` or `result`.
        max_turns: the most turns of a completion; the last call of so many is not answered.
        max_chars: the most characters of an answer that the policy reads.
    """

    def __init__(self, tools: Mapping[str, Tool], max_turns: int = 4, max_chars: int = 512) -> None:
        for name in tools:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _TAKEN:
                raise ConfigError(
                    f"environment.tools.{name}: no name for a tag; valid: small letters, digits and _, "
                    f"and none of {', '.join(sorted(_TAKEN))}"
                )
        if not tools:
            raise ConfigError("environment.tools is empty; valid: at least one. Type environment=calculator")
        for name, value in {"max_turns": max_turns, "max_chars": max_chars}.items():
            if value < 1:
                raise ConfigError(f"environment.{name}={value}: must be at least 1")
        self.tools, self.max_turns, self.max_chars = dict(tools), max_turns, max_chars
        self._call = re.compile(rf"<({'|'.join(self.tools)})>(.*?)</\1>", re.DOTALL)

    def reset(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[None]:
        return [None] * len(prompts)

    def asks(self, text: str) -> bool:
        return self._call.search(text) is not None

    def step(self, states: Sequence[None], turns: Sequence[Turn]) -> list[Step]:
        steps = [Step(None) for _ in turns]
        calls: dict[str, list[tuple[int, str]]] = {}
        for row, turn in enumerate(turns):
            if (found := self._call.search(turn.text)) is not None:
                calls.setdefault(found[1], []).append((row, found[2].strip()))
        for name, asked in calls.items():
            answers = self._ask(name, [request for _, request in asked])
            for (row, _), answer in zip(asked, answers, strict=True):
                failed = isinstance(answer, ToolFault)
                steps[row] = Step(None, fault=answer.message) if failed else Step(None, self._cut(answer))
        return steps

    def _ask(self, name: str, requests: list[str]) -> list[str | ToolFault]:
        try:
            answers = list(self.tools[name](requests))
        except LitReasonError:  # says what to type: no run should go on without it
            raise
        except Exception as error:
            return [ToolFault(f"{name}: {type(error).__name__}: {error}")] * len(requests)
        if len(answers) != len(requests):
            return [ToolFault(f"{name}: {len(answers)} answers to {len(requests)} requests")] * len(requests)
        return answers

    def _cut(self, answer: str) -> str:
        """A cut number must not look like a whole one."""
        return answer if len(answer) <= self.max_chars else answer[: self.max_chars] + " [cut]"
