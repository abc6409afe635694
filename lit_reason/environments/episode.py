"""One row's episode while it is played, and the completion that it becomes.

    history  prompt | turn 0 | answer | turn 1 | answer | turn 2
    mask              1 1 1    0 0 0    1 1 1    0 0 0    1 1 1

Shapes: S tokens of prompt and completion without the last, L MoE layers, K chosen experts."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_reason.data import Tokenizer
from lit_reason.environments.base import Step, Turn
from lit_reason.rollout import request_seed
from lit_reason.types import Completion, Prompt


@dataclass(eq=False)
class Episode:
    """The row's facts, what it has come to, and the environment's state of it.

    Args:
        prompt, seed, sample_idx: of the request.
        ids, logprobs, mask: all after the prompt, as in `Completion`.
        experts_SLK: of each turn, as far as the engine knew them.
        versions: (token, version) of each stretch of tokens that one version of the weights wrote.
        finish: what ended the last turn; "length" also where a limit leaves no room for an answer.
        over: no turn follows.
    """

    prompt: Prompt
    seed: int
    sample_idx: int
    state: Any = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    experts_SLK: list[Tensor] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"
    fault: str = ""
    over: bool = False

    def history(self) -> Prompt:
        """All so far, as the next turn's prompt."""
        return replace(self.prompt, token_ids=(*self.prompt.token_ids, *self.ids))

    def turn_seed(self, turn: int) -> int:
        """The first turn draws with the request's own seed, as without an environment; later ones with hashes of it."""
        return self.seed if turn == 0 else request_seed(self.seed, turn, self.prompt.id, self.sample_idx)

    def hear(self, completion: Completion, tokenizer: Tokenizer, asks: Callable[[str], bool], max_tokens: int) -> Turn:
        """Takes over what the engine generated, up to where it asks the environment, within `max_tokens` in all.

        A sampled completion that is cut at a stopping time keeps its log-probs: none depends on what came after.
        """
        room = max_tokens - len(self.ids)
        count = min(len(completion.token_ids), room)
        finish = completion.finish_reason if count == len(completion.token_ids) else "length"
        stopped = finish == "stop" and completion.token_ids[-1] in tokenizer.stop_ids
        own = completion.token_ids[: count - stopped]
        asked = asks(tokenizer.decode(own))
        if asked:
            count = bisect.bisect_left(range(len(own)), True, key=lambda n: asks(tokenizer.decode(own[:n])))
            count, finish, own = max(count, 1), "stop", own[:count]
        self._append(completion, count)
        self.finish = finish
        return Turn(tokenizer.decode(own), finish)

    def _append(self, completion: Completion, count: int) -> None:
        start, read = len(self.ids), len(self.prompt.token_ids) + len(self.ids) + count - 1
        if completion.experts_SLK is not None:
            self.experts_SLK.append(completion.experts_SLK[:read])
        changes = [(0, completion.version), *completion.switches]
        self.versions += [(start + token, version) for token, version in changes if token < count]
        self.ids += completion.token_ids[:count]
        self.logprobs += completion.logprobs[:count]
        self.mask += completion.mask[:count] if completion.mask is not None else [1] * count

    def read(self, step: Step, answer: Sequence[int] | None, room: int) -> None:
        """Takes over the environment's answer; the episode is over without one, or if no token fits after it.

        Args:
            answer: as token ids.
            room: the most tokens that the completion may have; 0 where no turn may follow.
        """
        self.state, self.fault = step.state, step.fault
        interrupts = step.role == "user" and self.finish == "length"
        if answer is None or interrupts:
            self.over = True
        elif len(self.ids) + len(answer) >= room:  # half an answer would be worse than none
            self.over, self.finish = True, "length"
        else:
            self.ids += answer
            self.logprobs += [0.0] * len(answer)
            self.mask += [0] * len(answer)

    def completion(self, tokenizer: Tokenizer) -> Completion:
        """The whole as one completion."""
        stopped = self.ids[-1] in tokenizer.stop_ids
        switches = [new for old, new in zip(self.versions, self.versions[1:], strict=False) if old[1] != new[1]]
        return Completion(
            prompt_id=self.prompt.id,
            sample_idx=self.sample_idx,
            token_ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            text=tokenizer.decode(self.ids[:-1] if stopped else self.ids),
            finish_reason=self.finish,
            version=self.versions[0][1],
            seed=self.seed,
            mask=None if all(self.mask) else tuple(self.mask),
            experts_SLK=self._experts(),
            switches=tuple(switches),
            fault=self.fault,
        )

    def _experts(self) -> Tensor | None:
        """The choices of every token that a turn knew. Of two turns that read it the earlier one counts: it drew the
        next token from them, the later one only looked back."""
        if not self.experts_SLK:
            return None
        longest = self.experts_SLK[-1]
        S = len(self.prompt.token_ids) + len(self.ids) - 1
        joined = longest.new_full((S, *longest.shape[1:]), -1)
        for turn_SLK in reversed(self.experts_SLK):
            known = joined[: len(turn_SLK)]
            joined[: len(turn_SLK)] = torch.where(turn_SLK >= 0, turn_SLK, known)
        return joined
