"""From prompts to scored groups: the part of a round that can go on beside training.

    deal prompts -> generate P x G completions -> score -> (again, in place of groups without a signal)

Nothing here reads the policy: only the engine, the verifiers and the prompts' cursor are touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lit_reason.loop.groups import apart, cut, join
from lit_reason.loop.metrics import Clock
from lit_reason.loop.ranks import all_or_none, gather, share
from lit_reason.loop.shape import RoundShape, Stages
from lit_reason.types import Prompt, RolloutGroup


@dataclass(frozen=True)
class Rollout:
    """A generated and scored round.

    Args:
        index: the round it is for.
        groups: P, to be learnt from.
        silent: how many at their end carry no signal (known with `refills` alone).
        generated: all groups, in the order of their generation, dropped ones too.
        seconds: wall time of `generate` and `score`, of this process.
    """

    index: int
    groups: list[RolloutGroup]
    silent: int
    generated: list[RolloutGroup]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def age(self) -> int:
        """Rounds between the oldest weights that it was begun with and those that its round trains."""
        return max(self.index - completion.version for group in self.generated for completion in group.completions)


class Collector:
    """Generates and scores rounds; the arguments are those of `RolloutLoop`."""

    def __init__(
        self,
        prompts: Any,
        stages: Stages,
        shape: RoundShape,
        request_seed: Callable[[int, int, str, int], int],
        seed: int,
    ) -> None:
        self.prompts, self.stages, self.shape = prompts, stages, shape
        self.request_seed, self.seed = request_seed, seed

    def __call__(self, index: int) -> Rollout:
        """Round `index`. If it fails, its prompts will be dealt again: a run that goes on has lost none."""
        before = self.prompts.state_dict()
        try:
            return self._collect(index)
        except BaseException:
            self.prompts.load_state_dict(before)
            raise

    def _collect(self, index: int) -> Rollout:
        P, kept, silent, dealt = self.shape.prompts_per_round, [], [], Counter[str]()
        generated: list[RolloutGroup] = []
        clock = Clock()
        for refill in range(1 + self.shape.refills):
            groups = self._rollout(index, self.prompts.next(P - len(kept)), dealt, clock)
            generated += groups
            seconds = {name: clock.laps[name] for name in ("generate", "score")}
            if not self.shape.refills:
                return Rollout(index, groups, 0, groups, seconds)
            speaks = self._speaks(groups)
            kept += [group for group, signal in zip(groups, speaks, strict=True) if signal]
            silent += [group for group, signal in zip(groups, speaks, strict=True) if not signal]
            if len(kept) == P or refill == self.shape.refills:
                missing = P - len(kept)
                return Rollout(index, kept + silent[:missing], missing, generated, seconds)
        raise AssertionError("the last refill returns")

    def _rollout(self, index: int, prompts: Sequence[Prompt], dealt: Counter[str], clock: Clock) -> list[RolloutGroup]:
        """One scored group per prompt. Every process makes its share of them and gets all."""
        seeds = self._seeds(index, prompts, dealt)
        with all_or_none():
            groups = self._own_rollout(share(prompts), share(seeds), clock)
        return gather(groups)

    def _own_rollout(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], clock: Clock
    ) -> list[RolloutGroup]:
        """This process's share."""
        if not prompts:
            return []
        G = self.shape.group_size
        repeated = [prompt for prompt in prompts for _ in range(G)]
        flat_seeds = [seed for group in seeds for seed in group]
        completions = self.stages.generate(repeated, flat_seeds, list(range(G)) * len(prompts))
        greedy = self.stages.greedy(prompts) if self.stages.greedy is not None else None
        clock.lap("generate")
        groups = cut(prompts, completions, self.stages.score(repeated, completions))
        if greedy is not None:
            judged = apart(self.stages.score(prompts, greedy), 1)
            groups = [replace(group, greedy=one) for group, one in zip(groups, judged, strict=True)]
        clock.lap("score")
        return groups

    def _seeds(self, index: int, prompts: Sequence[Prompt], dealt: Counter[str]) -> list[list[int]]:
        """G seeds a prompt. A prompt that is dealt twice in a round, around the end of an epoch, goes on counting its
        samples: equal seeds would give equal completions."""
        G, seeds = self.shape.group_size, []
        for prompt in prompts:
            first = dealt[prompt.id]
            seeds.append([self.request_seed(self.seed, index, prompt.id, first + i) for i in range(G)])
            dealt[prompt.id] += G
        return seeds

    def _speaks(self, groups: Sequence[RolloutGroup]) -> list[bool]:
        """Whether each group carries a signal."""
        assert self.stages.informative is not None
        scores, G = join(groups), self.shape.group_size
        group_B = torch.arange(len(groups)).repeat_interleave(G)
        speaks_B = self.stages.informative(scores.values_BR, scores.weights_R, group_B, scores.valid_B)
        return speaks_B.view(-1, G).any(1).tolist()
