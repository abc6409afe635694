"""The training dataloader of reinforcement learning: each round generates, scores, and deals out micro-batches.

    __next__ --buffer empty?--> push(weights) -> generate P x G completions -> score (-> again, for silent groups)
         |                      -> old/ref log-probs, values -> advantages
         |                      -> epochs x minibatches x micro-batches -> buffer
         +--yield one PolicyBatch-->  Lightning's training_step, accumulation, optimizer step

It has a `__len__`: without one Lightning fetches a batch ahead, and every rollout would be one step stale.
Round r is generated when its first batch is asked for, which is after the last optimizer step of round r-1; with
`staleness`, while rounds before it are trained (`ahead.py`).

Several processes generate and score a share of the prompts each, then all know the whole round: statistics,
denominators and the cut into batches do not depend on their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_reason.errors import CheckpointError, RolloutError
from lit_reason.loop.ahead import Ahead
from lit_reason.loop.batching import collate, minibatches, split, take
from lit_reason.loop.collect import Collector, Rollout
from lit_reason.loop.groups import greedy_rewards, join, with_greedy
from lit_reason.loop.metrics import Clock, advantage_metrics, age_metrics, round_metrics
from lit_reason.loop.ranks import gather, rank_and_size, share
from lit_reason.loop.saved import pack_rollout, unpack_rollout
from lit_reason.loop.shape import Round, RoundShape, Stages
from lit_reason.types import PolicyBatch, RolloutGroup


class RolloutLoop:
    """An iterable of `PolicyBatch` with a length and an exact, tensors-only state.

    Args:
        prompts: a cursor with `next(n)`, `state_dict()` and `load_state_dict()` (`lit_reason.data.PromptCursor`).
        stages: what a round calls.
        shape: how a round is made and cut.
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
        stages.check_shape(shape)
        self.collect = Collector(prompts, stages, shape, request_seed, seed)
        self._round = 0
        self._buffer: list[list[PolicyBatch]] = []  # for every micro-batch to come, that of each process
        self._ahead = Ahead()
        self._training_since: float | None = None
        self._training_tokens = 0

    def __len__(self) -> int:
        return self.shape.rounds * self.shape.batches

    def __iter__(self) -> RolloutLoop:
        return self

    def __next__(self) -> PolicyBatch:
        self._ahead.check()
        if not self._buffer:
            if self._round == self.shape.rounds:
                self._round = 0
                raise StopIteration
            self._buffer = self._run_round()
            self._round += 1
        return self._buffer.pop(0)[rank_and_size()[0]]

    def _run_round(self) -> list[list[PolicyBatch]]:
        self.shape.check_ranks(rank_and_size()[1])
        clock = Clock(self._training_since, self._training_tokens)
        rollout = self._next_rollout(clock) if self.shape.staleness else self._newest_rollout(clock)
        clock.laps |= rollout.seconds
        groups = rollout.groups
        if self.stages.check is not None:
            self.stages.check(with_greedy(rollout.generated))
        batch = self._prepare(groups, rollout.silent)
        clock.lap("prepare")
        self._announce(rollout, batch, clock)
        self._training_since = time.perf_counter() - clock.laps["prepare"]  # its forwards are for training
        self._training_tokens = self.shape.epochs * sum(len(c.token_ids) for g in groups for c in g.completions)
        return self._deal(batch)

    def _newest_rollout(self, clock: Clock) -> Rollout:
        self.stages.push(self._round)
        clock.lap("sync")
        rollout = self.collect(self._round)
        if self.shape.sleep:
            assert self.stages.sleep is not None  # `Stages.check_shape`
            self.stages.sleep(self.shape.sleep)
        clock.lap("wait")
        return rollout

    def _next_rollout(self, clock: Clock) -> Rollout:
        """The next of the rounds made ahead. Before it is trained, its weights go to the engine for those to come."""
        r, stages, ahead = self._round, self.stages, self._ahead
        if not self.shape.in_flight:
            ahead.wait(1 if stages.freeze is not None else None)
            clock.lap("wait")
        push = partial(stages.push, r) if stages.freeze is None else stages.freeze(r)
        if self.shape.in_flight or not ahead.busy:
            push()
            push = None
        clock.lap("sync")
        for later in range(r + len(ahead), min(r + self.shape.staleness + 1, self.shape.rounds)):
            ahead.add(partial(self._make, later, push))
            push = None
        rollout = ahead.take()
        clock.lap("wait")
        if rollout.age > self.shape.staleness:
            raise RolloutError(
                f"round {r} was generated by weights that are {rollout.age} rounds old, and rollout.shape.staleness="
                f"{self.shape.staleness} is the most: the engine did not take over what was pushed, or tells a wrong "
                "version"
            )
        return rollout

    def _make(self, index: int, push: Callable[[], None] | None) -> Rollout:
        if push is not None:
            push()
        return self.collect(index)

    def _prepare(self, groups: Sequence[RolloutGroup], silent: int) -> PolicyBatch:
        """The round as one batch with everything that training reads; `silent` groups at its end are masked."""
        scores, greedy_BR = join(groups), greedy_rewards(groups)
        completions = [completion for group in groups for completion in group.completions]
        prompts = [group.prompt for group in groups for _ in group.completions]
        batch = collate(prompts, completions, self.max_completion, self.pad_id)
        if not torch.isfinite(batch.rollout_logprobs_BT).all():
            raise RolloutError(f"round {self._round}: the engine returned non-finite log-probs; the policy is damaged")
        valid_B = scores.valid_B if greedy_BR is None else scores.valid_B & greedy_BR.isfinite().all(1)
        valid_B[len(valid_B) - silent * self.shape.group_size :] = False  # out of the batch's statistics too
        counts_B = valid_B.clone()
        if self.shape.mask_truncated:
            counts_B &= torch.tensor([completion.finish_reason != "length" for completion in completions])
        batch.mask_BT = batch.mask_BT * counts_B[:, None]
        batch.old_logprobs_BT = self._in_micro_batches(self.stages.old_logprobs, batch)
        batch.ref_logprobs_BT = self._in_micro_batches(self.stages.ref_logprobs, batch)
        batch.values_BT = self._in_micro_batches(self.stages.values, batch)
        if self.stages.mismatch is not None and batch.old_logprobs_BT is not None:
            batch.mismatch_kl = self.stages.mismatch(batch)
        batch.advantages_BT, batch.returns_BT, batch.marked_BT = self.stages.assess(
            scores.values_BR,
            scores.weights_R,
            torch.arange(len(groups)).repeat_interleave(self.shape.group_size),
            batch.mask_BT,
            valid_B=valid_B,
            old_logprobs_BT=batch.old_logprobs_BT,
            ref_logprobs_BT=batch.ref_logprobs_BT,
            values_BT=batch.values_BT,
            greedy_BR=greedy_BR,
        )
        return batch

    def _in_micro_batches(self, forward: Callable[[PolicyBatch], Tensor] | None, batch: PolicyBatch) -> Tensor | None:
        """Runs a forward over the round in the training's micro-batch size, so that it needs no more memory."""
        if forward is None:
            return None
        size = max(1, len(batch) // (self.shape.minibatches * self.shape.micro_batches * rank_and_size()[1]))
        return torch.cat(gather([forward(take(batch, rows)) for rows in share(torch.arange(len(batch)).split(size))]))

    def _deal(self, batch: PolicyBatch) -> list[list[PolicyBatch]]:
        """The micro-batches of every optimizer step, for each process one."""
        P, G, size = self.shape.prompts_per_round, self.shape.group_size, rank_and_size()[1]
        group_B = torch.arange(P).repeat_interleave(G)
        dealt = []
        for epoch in range(self.shape.epochs):
            seed = self.request_seed(self.seed, self._round, "shuffle", epoch)
            for rows in minibatches(P, G, self.shape.minibatches, seed=seed):
                parts = split(batch, rows, group_B, self.shape.micro_batches * size)
                dealt += [parts[start : start + size] for start in range(0, len(parts), size)]
        return dealt

    def _announce(self, rollout: Rollout, batch: PolicyBatch, clock: Clock) -> None:
        """Rewards, lengths and rates are of all that was generated, groups and advantages of what is learnt from."""
        if self.on_round is None:
            return
        groups, generated = rollout.groups, rollout.generated
        advantages_B = (batch.advantages_BT * batch.mask_BT).sum(1) / batch.mask_BT.sum(1).clamp_min(1)
        metrics = advantage_metrics(advantages_B, join(groups).valid_B, self.shape.group_size)
        metrics |= round_metrics(generated) | age_metrics(generated, self._round) | clock.rates(generated)
        if self.shape.refills:
            metrics["rollout/refilled"] = float(len(generated) - len(groups))
        tokens = sum(len(c.token_ids) for group in generated for c in group.completions)
        self.on_round(Round(self._round, groups, advantages_B, tokens, metrics))

    def close(self) -> None:
        """Begins no further round in the background, and waits for the one on the way: then the engine is free. `next`
        begins them anew."""
        self._ahead.drop()
        self._ahead.wait()

    def state_dict(self) -> dict[str, Any]:
        """Integers, the cursor's integers, the tensors of the micro-batches not yet consumed, of all processes, and the
        rounds generated ahead: those on the way are waited for, since the weights that make them are not saved."""
        fields = PolicyBatch.__dataclass_fields__
        ahead = self._ahead.made()
        return {
            "round": self._round,
            "prompts": self.prompts.state_dict(),
            "ahead": [pack_rollout(rollout) for rollout in ahead],
            "buffer": [
                [{n: v for n in fields if (v := getattr(batch, n)) is not None} for batch in parts]
                for parts in self._buffer
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        buffer = [[PolicyBatch(**values) for values in parts] for parts in state["buffer"]]
        size = rank_and_size()[1]
        if buffer and len(buffer[0]) != size:
            raise CheckpointError(
                f"the checkpoint lies inside a round that was cut for {len(buffer[0])} processes, this run has {size}: "
                f"type trainer.devices={len(buffer[0])}, or resume from a checkpoint between two rounds"
            )
        ahead = [unpack_rollout(rollout) for rollout in state.get("ahead", ())]
        if (oldest := max((rollout.age for rollout in ahead), default=0)) > self.shape.staleness:
            raise CheckpointError(
                f"the checkpoint holds rounds that were generated {oldest} rounds ahead, and this run allows "
                f"rollout.shape.staleness={self.shape.staleness}: type rollout.shape.staleness={oldest}"
            )
        self.close()  # a round on its way would move the prompts
        self._round, self._buffer, self._ahead = state["round"], buffer, Ahead(ahead)
        self.prompts.load_state_dict(state["prompts"])
