"""The control: rewards keep their distribution and lose their completion."""

import torch

from lit_reason.rewards import Length, Rubric, ShuffledRubric
from lit_reason.rewards.base import RewardFault
from lit_reason.types import Completion, Prompt, RewardState


class FailsOnThree:
    weight = 1.0

    def __call__(self, prompts, completions):
        return [
            RewardFault(RewardState.ERROR, "three") if len(c.token_ids) == 3 else float(len(c.token_ids))
            for c in completions
        ]


def completions(n):
    return [Completion("p", i, tuple(range(i)), (0.0,) * i, "", "stop", 0, 1000 + i) for i in range(1, n + 1)]


def test_rows_are_permuted_whole_and_the_same_way_each_time():
    n = 64
    prompts, made = [Prompt("p", "q", "a", "s")] * n, completions(n)
    rubric = Rubric({"tokens": FailsOnThree(), "length": Length(max_tokens=40, buffer=10)}, max_fault_fraction=0.5)
    straight, shuffled = rubric.score(prompts, made), ShuffledRubric(rubric).score(prompts, made)
    again = ShuffledRubric(rubric).score(prompts, made)
    assert torch.equal(shuffled.values_BR.nan_to_num(-1), again.values_BR.nan_to_num(-1))
    # columns travel together: the token count names the row that a reward came from
    origin = shuffled.values_BR[:, 0].nan_to_num(3).long() - 1
    assert sorted(origin.tolist()) == list(range(n))
    assert (origin != torch.arange(n)).float().mean() > 0.8
    assert torch.equal(shuffled.values_BR[:, 1], straight.values_BR[origin, 1])
    [(row, name)] = shuffled.messages
    assert (int(origin[row]), name) == (2, "tokens")
    assert shuffled.states_BR[row, 0] == RewardState.ERROR
