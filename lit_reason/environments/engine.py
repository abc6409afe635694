"""An engine whose completions are episodes: it generates, asks the environment, and goes on with the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lit_reason.data import ChatTemplate, Tokenizer, default_chat
from lit_reason.environments.base import Environment, Step
from lit_reason.environments.episode import Episode
from lit_reason.errors import ConfigError
from lit_reason.rollout import Engine, Progress, Sampling
from lit_reason.rollout.engine import OnProgress, check_requests
from lit_reason.types import Completion, Prompt


class EnvironmentEngine:
    """Wraps an engine: `generate` plays whole episodes, everything else is the engine's own.

    A completion that never asks the environment is, token for token, the engine's.

    Example::

        engine = EnvironmentEngine(BuiltinEngine(tokenizer), Tools({"calculator": Calculator()}), tokenizer)

    Trap: `sampling.max_tokens` and the model's context hold the whole completion, what the environment says included.

    Args:
        engine: generates each turn, from the history as token ids.
        environment: answers.
        tokenizer, chat: by which answers become tokens; the template that fits the tokenizer if None.
    """

    def __init__(
        self, engine: Engine, environment: Environment, tokenizer: Tokenizer, chat: ChatTemplate | None = None
    ) -> None:
        if not isinstance(environment, Environment):
            raise ConfigError(
                f"environment is a {type(environment).__name__}; valid: an object with max_turns, reset, asks and step "
                "(lit_reason.environments.Environment)"
            )
        self.engine, self.environment, self.tokenizer = engine, environment, tokenizer
        self.chat = chat or default_chat(tokenizer)
        self._context: int | None = None  # of the model, in tokens

    def push(self, model: nn.Module, version: int) -> None:
        self.engine.push(model, version)
        self._context = getattr(getattr(model, "config", None), "max_seq_len", None)

    def version(self) -> int:
        return self.engine.version()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[Completion]:
        check_requests(prompts, seeds)
        states = self.environment.reset(prompts, seeds)
        idx = [0] * len(prompts) if sample_idx is None else sample_idx
        episodes = [Episode(*facts) for facts in zip(prompts, seeds, idx, states, strict=True)]
        live, report = episodes, _Report(progress, len(episodes))
        for turn in range(self.environment.max_turns):
            self._play(live, turn, sampling, report)
            live = [episode for episode in live if not episode.over]
            report.done = len(episodes) - len(live)
            if not live:
                break
        report.close()
        return [episode.completion(self.tokenizer) for episode in episodes]

    def _play(self, live: Sequence[Episode], turn: int, sampling: Sampling, report: _Report) -> None:
        """One turn of all live episodes: the engine once, the environment once."""
        longest = replace(sampling, max_tokens=max(sampling.max_tokens - len(episode.ids) for episode in live))
        said = self.engine.generate(
            [episode.history() for episode in live],
            longest,
            [episode.turn_seed(turn) for episode in live],
            [episode.sample_idx for episode in live],
            report.during_turn,
        )
        report.tokens += sum(len(completion.token_ids) for completion in said)
        turns = [
            episode.hear(completion, self.tokenizer, self.environment.asks, sampling.max_tokens)
            for episode, completion in zip(live, said, strict=True)
        ]
        last = turn + 1 == self.environment.max_turns
        for episode, step in zip(live, self.environment.step([e.state for e in live], turns), strict=True):
            room = sampling.max_tokens
            if self._context is not None:
                room = min(room, self._context - len(episode.prompt.token_ids))
            episode.read(step, self._answer_ids(step), 0 if last else room)

    def _answer_ids(self, step: Step) -> list[int] | None:
        if step.observation is None or step.fault:
            return None
        render = {"tool": self.chat.result_ids, "user": self.chat.next_question_ids}[step.role]
        return render(self.tokenizer, step.observation)

    def __getattr__(self, name: str) -> Any:
        """What else an engine has (`close`, counters) is reached through this one."""
        if name.startswith("__") or name == "engine":  # copies and pickles look before `engine` is there
            raise AttributeError(name)
        return getattr(self.engine, name)


class _Report:
    """The engine's progress within turns as that of the whole: a completion is done when its last turn is."""

    def __init__(self, progress: OnProgress | None, total: int) -> None:
        self.progress, self.total = progress, total
        self.done = self.tokens = 0
        self.start = time.perf_counter()
        self.during_turn = None if progress is None else lambda turn: self._tell(self.tokens + turn.tokens)

    def _tell(self, tokens: int) -> None:
        if self.progress is not None:
            self.progress(Progress(self.done, self.total, tokens, time.perf_counter() - self.start))

    def close(self) -> None:
        self.done = self.total
        self._tell(self.tokens)
