"""The control of every reinforcement-learning claim: the same rewards, dealt to the wrong completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lit_reason.rewards.rubric import Rubric
from lit_reason.types import Completion, Prompt, Scores


class ShuffledRubric:
    """Scores with `rubric`, then permutes the rows: rewards keep their distribution and lose their meaning.

    The permutation is a function of the completions' seeds, so that a resumed run repeats it.
    """

    def __init__(self, rubric: Rubric) -> None:
        self.rubric = rubric

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        scores = self.judge(prompts, completions)
        self.check(scores)
        return scores

    def check(self, scores: Scores) -> None:
        self.rubric.check(scores)

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        scores = self.rubric.judge(prompts, completions)
        seed = sum(completion.seed for completion in completions) % 2**63
        order = torch.randperm(len(completions), generator=torch.Generator().manual_seed(seed))
        row_of = {old: new for new, old in enumerate(order.tolist())}
        messages = {(row_of[row], name): text for (row, name), text in scores.messages.items()}
        return replace(scores, values_BR=scores.values_BR[order], states_BR=scores.states_BR[order], messages=messages)
