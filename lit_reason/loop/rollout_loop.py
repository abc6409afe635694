"""The training dataloader of reinforcement learning: each round generates, scores, and deals out micro-batches.

    __next__ --buffer empty?--> push(weights) -> generate P x G completions -> score -> old/ref log-probs
         |                      -> advantages -> epochs x minibatches x micro-batches -> buffer
         +--yield one PolicyBatch-->  Lightning's training_step, accumulation, optimizer step

It has a `__len__`: without one Lightning fetches a batch ahead, and every rollout would be one step stale.
Round r is generated when its first batch is asked for, which is after the last optimizer step of round r-1.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_reason.errors import ConfigError, RolloutError
from lit_reason.loop.batching import collate, minibatches, split, take
from lit_reason.types import Completion, PolicyBatch, Prompt, RolloutGroup, Scores


@dataclass(frozen=True)
class RoundShape:
    """How a round is cut.

    Args:
        rounds: how many rounds the run has.
        prompts_per_round, group_size: P and G; a round has B = P * G completions.
        epochs: passes over a round's completions.
        minibatches: optimizer steps per pass.
        micro_batches: backward passes per optimizer step; must equal the Trainer's `accumulate_grad_batches`.
    """

    rounds: int = 100
    prompts_per_round: int = 32
    group_size: int = 8
    epochs: int = 1
    minibatches: int = 1
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"rollout.shape.{name}={value}: must be at least 1")
        if self.prompts_per_round % self.minibatches:
            raise ConfigError(
                f"rollout.shape.prompts_per_round={self.prompts_per_round} is not divisible by "
                f"rollout.shape.minibatches={self.minibatches}: whole groups are dealt to optimizer steps"
            )
        rows = self.prompts_per_round // self.minibatches * self.group_size
        if rows % self.micro_batches:
            raise ConfigError(
                f"{rows} sequences per optimizer step (prompts_per_round * group_size / minibatches) are not divisible "
                f"by micro_batches={self.micro_batches}; valid: a divisor of {rows}"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps per round."""
        return self.epochs * self.minibatches

    @property
    def batches(self) -> int:
        """Micro-batches per round."""
        return self.updates * self.micro_batches


@dataclass(frozen=True)
class Stages:
    """What a round calls, in this order. Each is a plain callable, so that the loop knows no engine and no model.

    `old_logprobs` may be None when a round has a single update: the new log-probs, detached, are the old ones.
    """

    push: Callable[[int], None]
    generate: Callable[[Sequence[Prompt], Sequence[int], Sequence[int]], list[Completion]]
    score: Callable[[Sequence[Prompt], Sequence[Completion]], Scores]
    advantages: Callable[..., Tensor]
    old_logprobs: Callable[[PolicyBatch], Tensor] | None = None
    ref_logprobs: Callable[[PolicyBatch], Tensor] | None = None


@dataclass(frozen=True)
class Round:
    """What a finished rollout tells its listeners: the groups, their advantages and the time each part took."""

    index: int
    groups: Sequence[RolloutGroup]
    advantages_B: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class RolloutLoop:
    """An iterable of `PolicyBatch` with a length and an exact, tensors-only state.

    Args:
        prompts: a cursor with `next(n)`, `state_dict()` and `load_state_dict()` (`lit_reason.data.PromptCursor`).
        stages: what a round calls.
        shape: how a round is cut.
        request_seed: (run seed, round, prompt id, sample index) -> the request's seed.
        max_completion: the generation limit in tokens, for objectives that divide by it.
        pad_id: fills the end of shorter sequences.
        on_round: called once per round, before its first batch is yielded.
    """

    def __init__(
        self,
        prompts: Any,
        stages: Stages,
        shape: RoundShape,
        *,
        request_seed: Callable[[int, int, str, int], int],
        seed: int,
        max_completion: int,
        pad_id: int = 0,
        on_round: Callable[[Round], None] | None = None,
    ) -> None:
        self.prompts, self.stages, self.shape = prompts, stages, shape
        self.request_seed, self.seed = request_seed, seed
        self.max_completion, self.pad_id, self.on_round = max_completion, pad_id, on_round
        if stages.old_logprobs is None and shape.updates > 1:
            raise ConfigError(
                f"{shape.updates} updates per round need Stages.old_logprobs, got None: "
                "type policy.stages(..., updates=shape.updates)"
            )
        self._round = 0
        self._buffer: list[PolicyBatch] = []
        self._training_since: float | None = None
        self._training_tokens = 0

    def __len__(self) -> int:
        return self.shape.rounds * self.shape.batches

    def __iter__(self) -> RolloutLoop:
        return self

    def __next__(self) -> PolicyBatch:
        if not self._buffer:
            if self._round == self.shape.rounds:
                self._round = 0
                raise StopIteration
            self._buffer = self._run_round()
            self._round += 1
        return self._buffer.pop(0)

    def _run_round(self) -> list[PolicyBatch]:
        clock = _Clock(self._training_since, self._training_tokens)
        P, G = self.shape.prompts_per_round, self.shape.group_size
        distinct = self.prompts.next(P)
        prompts = [prompt for prompt in distinct for _ in range(G)]
        samples = list(range(G)) * P
        seeds = self._seeds(distinct)

        self.stages.push(self._round)
        clock.lap("sync")
        completions = self.stages.generate(prompts, seeds, samples)
        clock.lap("generate")
        scores = self.stages.score(prompts, completions)
        clock.lap("score")

        batch = collate(prompts, completions, self.max_completion, self.pad_id)
        if not torch.isfinite(batch.rollout_logprobs_BT).all():
            raise RolloutError(f"round {self._round}: the engine returned non-finite log-probs; the policy is damaged")
        batch.mask_BT = batch.mask_BT * scores.valid_B[:, None]
        if self.stages.old_logprobs is not None:
            batch.old_logprobs_BT = self._in_micro_batches(self.stages.old_logprobs, batch)
        if self.stages.ref_logprobs is not None:
            batch.ref_logprobs_BT = self._in_micro_batches(self.stages.ref_logprobs, batch)
        group_B = torch.arange(P).repeat_interleave(G)
        batch.advantages_BT = self.stages.advantages(
            scores.values_BR,
            scores.weights_R,
            group_B,
            batch.mask_BT,
            valid_B=scores.valid_B,
            old_logprobs_BT=batch.old_logprobs_BT,
            ref_logprobs_BT=batch.ref_logprobs_BT,
        )
        clock.lap("prepare")
        self._announce(distinct, completions, scores, batch, clock)
        batches = [
            micro
            for epoch in range(self.shape.epochs)
            for rows in minibatches(P, G, self.shape.minibatches, seed=self._shuffle_seed(epoch))
            for micro in split(batch, rows, group_B, self.shape.micro_batches)
        ]
        self._training_since = time.perf_counter() - clock.laps["prepare"]  # its forwards are for training
        self._training_tokens = self.shape.epochs * sum(len(c.token_ids) for c in completions)
        return batches

    def _seeds(self, prompts: Sequence[Prompt]) -> list[int]:
        """G seeds a prompt. A prompt that is dealt twice, around the end of an epoch, goes on counting its samples:
        equal seeds would give equal completions."""
        G, dealt, seeds = self.shape.group_size, Counter[str](), []
        for prompt in prompts:
            first = dealt[prompt.id]
            seeds += [self.request_seed(self.seed, self._round, prompt.id, first + i) for i in range(G)]
            dealt[prompt.id] += G
        return seeds

    def _shuffle_seed(self, epoch: int) -> int:
        return self.request_seed(self.seed, self._round, "shuffle", epoch)

    def _in_micro_batches(self, logprobs: Callable[[PolicyBatch], Tensor], batch: PolicyBatch) -> Tensor:
        """Runs a forward over the round in the training's micro-batch size, so that it needs no more memory."""
        size = len(batch) // (self.shape.minibatches * self.shape.micro_batches)
        return torch.cat([logprobs(take(batch, rows)) for rows in torch.arange(len(batch)).split(size)])

    def _announce(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        scores: Scores,
        batch: PolicyBatch,
        clock: _Clock,
    ) -> None:
        if self.on_round is None:
            return
        G = self.shape.group_size
        advantages_B = (batch.advantages_BT * batch.mask_BT).sum(1) / batch.mask_BT.sum(1).clamp_min(1)
        groups = []
        for g, prompt in enumerate(prompts):
            rows = slice(g * G, (g + 1) * G)
            messages = {(b - g * G, n): m for (b, n), m in scores.messages.items() if rows.start <= b < rows.stop}
            part = replace(
                scores, values_BR=scores.values_BR[rows], states_BR=scores.states_BR[rows], messages=messages
            )
            groups.append(RolloutGroup(prompt, completions[rows], part))
        metrics = round_metrics(completions, scores, advantages_B, G) | clock.rates(completions)
        self.on_round(Round(self._round, groups, advantages_B, metrics))

    def state_dict(self) -> dict[str, Any]:
        """Integers, the cursor's integers, and the tensors of the micro-batches not yet consumed."""
        fields = PolicyBatch.__dataclass_fields__
        return {
            "round": self._round,
            "prompts": self.prompts.state_dict(),
            "buffer": [{n: v for n in fields if (v := getattr(b, n)) is not None} for b in self._buffer],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round = state["round"]
        self.prompts.load_state_dict(state["prompts"])
        self._buffer = [PolicyBatch(**values) for values in state["buffer"]]


def round_metrics(completions: Sequence[Completion], scores: Scores, advantages_B: Tensor, G: int) -> dict[str, float]:
    """Rewards per column, groups without a signal, lengths; over the rows that every verifier could judge."""
    valid = scores.valid_B
    values_BR = scores.values_BR[valid]
    metrics: dict[str, float] = {}
    for r, name in enumerate(scores.names):
        column = values_BR[:, r]
        metrics[f"reward/{name}/mean"] = column.mean().item()
        metrics[f"reward/{name}/std"] = column.std(correction=0).item()
    silent_P = (advantages_B.unflatten(0, (-1, G)).abs() < 1e-6).all(1)  # batch norms leave rounding
    metrics["reward/zero_std_fraction"] = silent_P.float().mean().item()
    metrics["reward/faults"] = float((~valid).sum())
    metrics["advantage/std"] = advantages_B[valid].std(correction=0).item()
    lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float32)
    metrics["completion/length"] = lengths.mean().item()
    metrics["completion/truncated"] = sum(c.finish_reason == "length" for c in completions) / len(completions)
    return metrics


class _Clock:
    """Wall time of a round's parts. Training is that of the round before: it ends when this one begins.

    Args:
        training_since: when the round before began to train (s), None in a process's first round.
        training_tokens: completion tokens that it trained on, over all its epochs.
    """

    def __init__(self, training_since: float | None, training_tokens: int) -> None:
        self.last = time.perf_counter()
        self.train = self.last - training_since if training_since is not None else None
        self.training_tokens = training_tokens
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now

    def rates(self, completions: Sequence[Completion]) -> dict[str, float]:
        tokens = sum(len(c.token_ids) for c in completions)
        rates = {
            "speed/generate_tokens_per_s": tokens / self.laps["generate"],
            "speed/score_per_s": len(completions) / max(self.laps["score"], 1e-9),
            "speed/sync_s": self.laps["sync"],
        }
        if self.train:
            rates["speed/train_tokens_per_s"] = self.training_tokens / self.train
        return rates
