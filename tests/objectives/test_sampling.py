"""Which groups are worth training on, by hand and against the advantages themselves."""

import json
import math

import pytest
import torch

from lit_reason.objectives import Objective, informative

NORM = {"name": "group_norm", "eps": 0.0, "ddof": 1}
GDPO = {"name": "gdpo", "eps": 0.0, "ddof": 1, "batch_norm": None, "batch_eps": 0.0}


def call(rewards, groups, valid=None, weights=None, per_reward=False):
    rewards_BR = torch.tensor(rewards, dtype=torch.float32).reshape(len(groups), -1)
    weights_R = torch.ones(rewards_BR.shape[1]) if weights is None else torch.tensor(weights)
    valid_B = torch.ones(len(groups), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return informative(rewards_BR, weights_R, torch.tensor(groups), valid_B, per_reward=per_reward).tolist()


@pytest.mark.parametrize("per_reward", [False, True])
def test_some_but_not_all_correct(per_reward):
    """0 < #correct < G, rows in any order: group 7 has 1 of 3, group 2 has 2 of 2, group 4 none of 2."""
    rewards, groups = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [2, 7, 7, 4, 2, 7, 4]
    wanted = [g == 7 for g in groups]
    assert call(rewards, groups, per_reward=per_reward) == wanted
    assert call([0.5] * 7, groups, per_reward=per_reward) == [False] * 7


def test_the_sum_and_the_columns_see_different_signals():
    """Group 0: (1, 0) and (0, 1) have one sum. Group 1: only the weightless third column varies."""
    rewards, groups = [[1, 0, 3], [0, 1, 3], [1, 1, 3], [1, 1, 4]], [0, 0, 1, 1]
    weights = [1.0, 1.0, 0.0]
    assert call(rewards, groups, weights=weights) == [False] * 4
    assert call(rewards, groups, weights=weights, per_reward=True) == [True, True, False, False]
    assert call(rewards, groups, weights=[1.0, 0.5, 0.0]) == [True, True, False, False]
    assert call(rewards, groups, weights=[0.0, 0.0, -1.0], per_reward=True) == [False, False, True, True]
    assert call(rewards, groups, weights=[0.0, 0.0, 0.0], per_reward=True) == [False] * 4


@pytest.mark.parametrize("per_reward", [False, True])
def test_failed_rows_are_no_signal_and_go_with_their_group(per_reward):
    """Group 0 varies by its failed row only, group 1 has one valid row, group 2 none, group 3 two that differ."""
    nan = math.nan
    rewards, groups = [1.0, 1.0, nan, 0.0, nan, nan, nan, 0.0, 1.0, nan], [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    valid = [not math.isnan(r) for r in rewards]
    assert call(rewards, groups, valid, per_reward=per_reward) == [g == 3 for g in groups]
    # what a failed row holds does not matter
    filled = [9.0 if math.isnan(r) else r for r in rewards]
    assert call(filled, groups, valid, per_reward=per_reward) == [g == 3 for g in groups]
    none = torch.zeros(0, dtype=torch.long)
    assert informative(torch.zeros(0, 2), torch.ones(2), none, none.bool(), per_reward=per_reward).shape == (0,)


def test_equal_sums_are_equal_to_the_last_bit():
    """Halves and quarters add up exactly; 0.1 + 0.2 and 0.3 as float32 are 8/2^30 apart, a signal of 7e-9."""
    assert call([[0.5, 0.25], [0.25, 0.5], [0.75, 0.0]], [0, 0, 0]) == [False] * 3
    a, b, c = (float(torch.tensor(x)) for x in (0.1, 0.2, 0.3))
    assert a + b != c and abs(a + b - c) == pytest.approx(8 / 2**30)
    assert call([[0.1, 0.2], [0.3, 0.0]], [0, 0]) == [True, True]


@pytest.mark.parametrize(
    ("per_reward", "advantage"), [(False, "group_mean"), (False, NORM), (True, GDPO)]
)  # fmt: skip
def test_it_says_where_the_advantages_are_zero(per_reward, advantage):
    """400 random groups of 3 rows and 2 columns of tenths (so that rounding matters), some rows failed.

    A group without signal gets 0 on every row; one with a signal on at least one, but for two columns that mirror each
    other under GDPO, which weights 0.7 and 0.4 rule out.
    """
    generator = torch.Generator().manual_seed(3)
    rewards_BR = torch.randint(0, 3, (1200, 2), generator=generator).float() / 10
    valid_B = torch.rand(1200, generator=generator) > 0.3
    group_B, weights_R = torch.arange(400).repeat(3), torch.tensor([0.7, 0.4])
    got_B = informative(rewards_BR, weights_R, group_B, valid_B, per_reward=per_reward)
    objective = Objective(advantage, "token", "none", "token_mean")
    advantages_BT = objective.advantages(rewards_BR, weights_R, group_B, torch.ones(1200, 1), valid_B=valid_B)
    moved_P = torch.zeros(400).index_add(0, group_B, (advantages_BT[:, 0] != 0).float()) > 0
    assert torch.equal(got_B, moved_P[group_B])
    assert 100 < int(got_B.sum()) < 1100


@pytest.mark.parametrize(
    "path",
    [
        ("zero_std_groups", "dynamic_sampling_keep", 0),
        ("dapo_dynamic_sampling", "keep", 1),
        ("fully_masked_sequence", "gspo", "sequence_ratio", 4),
        ("fully_masked_sequence", "gspo", "gradient_flows", 3),
        ("fully_masked_sequence", "gspo", "loss"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_each_edge_case_is_compared(checker, golden_copy, path):
    file = golden_copy / "edge_cases.json"
    content = json.loads(file.read_text())
    node = content["cases"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = not node[path[-1]] if isinstance(node[path[-1]], bool) else node[path[-1]] + 1e-9
    file.write_text(json.dumps(content))
    assert checker.main([str(golden_copy), "--subset"]) == 1
