"""Environments of the `verifiers` library: their data as prompts, their turns as an `Environment`.

`conf/environment/verifiers.yaml` says how a run names one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lit_reason.data import prompt_id
from lit_reason.environments.base import Step, Turn
from lit_reason.environments.hosted import Hosted, Row, load
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt


def hosted(name: str, args: Mapping[str, Any] | None) -> Hosted:
    """The environment `name`, loaded once for all that ask with the same arguments."""
    return load(name, json.dumps(dict(args or {}), sort_keys=True))


class VerifiersPrompts:
    """A source of prompts: the rows of an environment's dataset, their messages of system and user as one question.

    Trap: rows of the same question are one prompt here, whatever else they hold.

    Args:
        name: of an installed environment package, as `verifiers.load_environment` takes it. Its code runs in this
            process: take only those that you trust.
        args: of its `load_environment`; give environment, data and reward the same.
        size: the most rows; -1 takes all.
    """

    def __init__(self, name: str, args: Mapping[str, Any] | None = None, size: int = -1) -> None:
        self.name, self.args, self.size = name, dict(args or {}), size

    def __iter__(self) -> Iterator[Prompt]:
        for index, row in enumerate(hosted(self.name, self.args).env.get_dataset(self.size)):
            row = json.loads(json.dumps({"example_id": index} | row, default=str))
            messages = (
                row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
            )
            if any(message["role"] not in ("system", "user") for message in messages):
                raise DataError(
                    f"row {index} of {self.name} begins with a conversation; valid: messages of system and user only"
                )
            question, answer = text_of(messages), str(row.get("answer") or "")
            yield Prompt(prompt_id(question), question, answer, f"verifiers/{self.name}", (), {"verifiers": row})


class _State(NamedTuple):
    """A row of theirs, and how many messages both sides know."""

    row: Row
    known: int


class Verifiers:
    """Plays an environment of theirs: single-turn, multi-turn or with tools.

    Tools are called as ours are, with their arguments as JSON: `<search>{"query": "x"}</search>`. Messages of tools are
    read as results, messages of the user as further questions.

    Trap: what it remembers of a row lies in this process until the reward `verifiers` has asked for it.

    Args:
        name, args: as in `VerifiersPrompts`.
        max_turns: the most turns of a completion, beside the environment's own limit.
        timeout_s: the most seconds that its part of a turn may take; beyond it the row is a fault.
    """

    def __init__(
        self, name: str, args: Mapping[str, Any] | None = None, max_turns: int = 10, timeout_s: float = 60.0
    ) -> None:
        if max_turns < 1:
            raise ConfigError(f"environment.max_turns={max_turns}: must be at least 1")
        self.max_turns, self.hosted = max_turns, hosted(name, args)
        self.hosted.timeout_s = timeout_s
        names = "|".join(map(re.escape, self.hosted.tools))
        self._call = re.compile(rf"<({names})>(.*?)</\1>" if names else r"(?!)", re.DOTALL)

    def reset(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[_State]:
        for prompt in prompts:
            if "verifiers" not in prompt.meta:
                raise DataError(f"prompt {prompt.id} of {prompt.source} is not the environment's. Type data=verifiers")
        keys = [(prompt.id, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        rows = self.hosted.start(keys, [dict(prompt.meta["verifiers"]) for prompt in prompts])
        for row, prompt in zip(rows, prompts, strict=True):
            if row.asked is not None and text_of(row.asked) != prompt.question:
                row.fault = "it begins with other messages than its dataset's"
        return [_State(row, len(row.asked or ())) for row in rows]

    def asks(self, text: str) -> bool:
        return self._call.search(text) is not None

    def step(self, states: Sequence[_State], turns: Sequence[Turn]) -> list[Step]:
        pairs = [(state, turn) for state, turn in zip(states, turns, strict=True) if _waits(state.row)]
        self.hosted.run([self._reply(state.row, turn) for state, turn in pairs])
        return [self._read(state) for state in states]

    async def _reply(self, row: Row, turn: Turn) -> None:
        found = self._call.search(turn.text)
        text = turn.text if found is None else turn.text[: found.start()]
        call = None if found is None else (found[1], found[2].strip())
        await self.hosted.reply(row, text, call, truncated=turn.finish_reason == "length")

    def _read(self, state: _State) -> Step:
        row, known = state
        if row.fault or row.asked is None:
            return Step(state, fault=row.fault)
        new = row.asked[known + 1 :]  # after the policy's own
        if len(row.asked) <= known or row.asked[known].role != "assistant" or not new:
            row.fault = "it rewrites the history, which a policy has already read"
            return Step(state, fault=row.fault)
        role = "tool" if all(message.role == "tool" for message in new) else "user"
        return Step(_State(row, len(row.asked)), text_of(new), role)


def _waits(row: Row) -> bool:
    return row.asked is not None and not row.fault


def text_of(messages: Sequence[Any]) -> str:
    """The messages' texts, a blank line between them; DataError for what is no text."""
    texts = []
    for message in messages:
        content = message["content"] if isinstance(message, dict) else message.content
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        for part in parts:
            part = part if isinstance(part, dict) else part.model_dump()
            if part.get("type") != "text":
                raise DataError(f"a message holds a part of type {part.get('type')!r}; valid: text only")
            texts.append(part["text"])
    return "\n\n".join(texts)
