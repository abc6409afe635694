"""Groups without signal, groups of one, failed rewards, and what the weights act on."""

import math

import pytest
import torch

from lit_reason.errors import NonFiniteError
from lit_reason.objectives import ADVANTAGES, Objective

SETTINGS = {
    "group_mean": {},
    "group_norm": {"eps": 1e-4, "ddof": 1},
    "gdpo": {"eps": 1e-4, "ddof": 1, "batch_norm": "sequence", "batch_eps": 1e-4},
    "reinforce": {"baseline": "batch_mean"},
    "rloo": {},
    "group_mean_batch_std": {"eps": 1e-4, "ddof": 1},
    "maxrl": {"eps": 1e-6, "baseline": "group_mean"},
    "pkpo": {"k": 2, "threshold": 3.0, "baseline": "leave_one_out_minus_one"},
    "passk": {"k": 2, "threshold": 3.0},
    "reinforce_pp": {"eps": 1e-8, "eps_rule": "floor", "ddof": 0},
    "reinforce_pp_baseline": {"eps": 1e-8, "eps_rule": "floor", "ddof": 0},
}

# These compare with other prompts too, or with nothing.
OVER_BATCH = {"reinforce", "reinforce_pp", "reinforce_pp_baseline"}


def call(name, rewards, groups, valid=None, dtype=torch.float64, weights=(1.0,), **settings):
    rewards_BR = torch.tensor(rewards, dtype=dtype).reshape(len(groups), -1)
    valid_B = torch.ones(len(groups), dtype=torch.bool) if valid is None else torch.tensor(valid)
    mask_BT = torch.ones(len(groups), 2, dtype=dtype)
    weights_R = torch.tensor(weights, dtype=dtype)
    return ADVANTAGES[name](
        rewards_BR, weights_R, torch.tensor(groups), valid_B, mask_BT, **(SETTINGS[name] | settings)
    )


def objective(name, **settings):
    return Objective({"name": name} | SETTINGS[name] | settings, "token", "none", "token_mean")


@pytest.mark.parametrize(
    ("name", "key"), [("group_norm", "grpo_eps1e4"), ("group_mean", "dr_grpo"), ("gdpo", "gdpo_trl")]
)
def test_zero_variance_groups(golden, name, key):
    """The reference's GDPO vectors are for two equal reward columns."""
    case = golden("edge_cases.json")["cases"]["zero_std_groups"]
    columns = 2 if name == "gdpo" else 1
    got = call(name, [[r] * columns for r in case["rewards"]], case["groups"], weights=(1.0,) * columns)
    torch.testing.assert_close(got, torch.tensor(case[key], dtype=torch.float64), atol=1e-12, rtol=0)
    assert (got[:8].abs() < 1e-15).all()


def test_token_batch_norm_gives_flat_groups_an_advantage(golden):
    """The trap of the length-weighted mean, as the reference has it."""
    case = golden("edge_cases.json")["cases"]["zero_std_groups"]
    mask_BT = torch.tensor(golden("batch_main.json")["inputs"]["mask"], dtype=torch.float64)
    got_BT = objective("gdpo", eps=1e-6, batch_norm="token", batch_eps=1e-8).advantages(
        torch.tensor(case["rewards"])[:, None].expand(-1, 2), torch.ones(2), torch.tensor(case["groups"]), mask_BT
    )
    expected_BT = torch.tensor(case["gdpo_verl_tokens"], dtype=torch.float64)
    torch.testing.assert_close(got_BT * mask_BT, expected_BT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 6, 7])
@pytest.mark.parametrize("name", ["group_norm", "gdpo"])
def test_equal_rewards_are_exactly_zero_even_without_eps(name, size, dtype):
    """The float32 mean of seven 0.1 is off by 7e-9: divided by eps 1e-9 it would be 0.82."""
    extra = {"batch_eps": 0.0} if name == "gdpo" else {}
    for eps in (0.0, 1e-9):
        got = call(name, [0.1] * size + [0.0, 1.0], [5] * size + [2, 2], dtype=dtype, eps=eps, **extra)
        assert (got[:size] == 0).all()
        assert (got[size:] != 0).all()


@pytest.mark.parametrize("reward", [0.1, -0.1])
def test_equal_rewards_of_either_sign_are_flat(reward):
    assert (
        call("group_norm", [reward] * 7 + [0.0, 1.0], [5] * 7 + [2, 2], dtype=torch.float32, eps=1e-9)[:7] == 0
    ).all()


def test_equal_rewards_of_a_whole_batch_are_zero_even_without_eps():
    for name in ("group_mean_batch_std", "group_norm"):
        assert (call(name, [0.1] * 6, [0, 0, 0, 1, 1, 1], eps=0.0) == 0).all()


def test_group_of_one(golden):
    case = golden("edge_cases.json")["cases"]["group_of_one"]
    got = call("group_norm", case["rewards"], case["groups"])
    torch.testing.assert_close(got, torch.tensor(case["recommended_grpo"], dtype=torch.float64), atol=1e-12, rtol=0)
    rloo = call("rloo", case["rewards"], case["groups"])
    torch.testing.assert_close(rloo, torch.tensor(case["recommended_rloo"], dtype=torch.float64), atol=1e-12, rtol=0)
    for name in set(SETTINGS) - OVER_BATCH:
        assert call(name, case["rewards"], case["groups"])[0] == 0


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_failed_row_counts_in_no_statistic(name):
    """NaN rows get 0, and the others are what they are without them."""
    rewards, groups = [1.0, 0.0, 0.25, 3.0, 1.0, 2.0, 5.0], [7, 7, 7, 7, 3, 3, 3]
    failed = [False, False, True, False, False, True, False]
    with_nan = [[math.nan] if bad else [r] for r, bad in zip(rewards, failed, strict=True)]
    weights_R, mask_BT = torch.ones(1), torch.ones(7, 4)
    got_BT = objective(name).advantages(
        torch.tensor(with_nan), weights_R, torch.tensor(groups), mask_BT, valid_B=~torch.tensor(failed)
    )
    keep = ~torch.tensor(failed)
    alone_BT = objective(name).advantages(
        torch.tensor(rewards)[keep][:, None], weights_R, torch.tensor(groups)[keep], mask_BT[keep]
    )
    assert got_BT.dtype == torch.float32
    assert (got_BT[~keep] == 0).all()
    torch.testing.assert_close(got_BT[keep], alone_BT)
    assert (alone_BT != 0).any()


def test_failed_row_has_no_weight_in_the_token_norm():
    """GDPO's length-weighted mean and variance, as if the row were not there."""
    rewards, groups, lengths = [1.0, 0.0, 9.0, 3.0, 1.0], [0, 0, 0, 1, 1], [1, 4, 3, 2, 4]
    mask_BT = (torch.arange(4) < torch.tensor(lengths)[:, None]).double()
    keep = torch.tensor([True, True, False, True, True])
    given = torch.tensor(rewards)[:, None], torch.ones(1), torch.tensor(groups)
    made = objective("gdpo", batch_norm="token", batch_eps=1e-8)
    got_BT = made.advantages(*given, mask_BT, valid_B=keep)
    alone_BT = made.advantages(given[0][keep], given[1], given[2][keep], mask_BT[keep])
    assert (got_BT[~keep] == 0).all()
    torch.testing.assert_close(got_BT[keep], alone_BT)


def test_group_left_with_one_valid_row_is_zero():
    got = call("group_norm", [1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], valid=[True, False, True, True])
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2] == -got[3] != 0


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_value_of_a_failed_row_is_not_looked_at(name):
    groups, valid = [0, 0, 0, 1, 1], [True, True, False, True, True]
    low = call(name, [1.0, 0.0, -50.0, 2.0, 3.0], groups, valid)
    torch.testing.assert_close(low, call(name, [1.0, 0.0, 70.0, 2.0, 3.0], groups, valid))
    assert (low[2] == 0).all()


def test_value_of_a_failed_row_is_not_looked_at_without_a_baseline():
    assert call("reinforce", [1.0, 7.0], [0, 0], [True, False], baseline=None).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("failed", [-5.0, 5.0])
def test_failed_row_does_not_make_a_flat_group_vary(failed):
    got = call("group_norm", [0.1] * 7 + [failed], [0] * 8, valid=[True] * 7 + [False], dtype=torch.float32, eps=1e-9)
    assert (got == 0).all()


def test_a_choice_never_sees_a_nan(monkeypatch):
    """A new advantage function need not think of failed verifiers' NaN."""
    seen = []
    monkeypatch.setitem(ADVANTAGES, "spy", lambda rewards_BR, *_: seen.append(rewards_BR) or rewards_BR[:, 0])
    rewards_BR = torch.tensor([[1.0], [math.nan]])
    Objective("spy", "token", "none", "token_mean").advantages(
        rewards_BR, torch.ones(1), torch.tensor([0, 0]), torch.ones(2, 3), valid_B=torch.tensor([True, False])
    )
    assert seen[-1].tolist() == [[1.0], [0.0]]  # the first was the probe of __init__


def test_nan_reward_in_a_valid_row_is_refused():
    rewards_BR = torch.tensor([[1.0, 0.0], [0.0, math.nan]])
    with pytest.raises(NonFiniteError, match="reward column 1 is nan in row 1"):
        objective("group_norm").advantages(rewards_BR, torch.ones(2), torch.tensor([0, 0]), torch.ones(2, 3))


def test_group_norm_by_hand():
    """(1, 0, 0, 0): mean 1/4, sample std 1/2."""
    got = call("group_norm", [1.0, 0.0, 0.0, 0.0], [0] * 4, eps=0.5)
    assert got.tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_weights_act_on_rewards_in_grpo_and_on_normalised_advantages_in_gdpo():
    """A reward's scale changes GRPO's advantage and not GDPO's; the weight changes both."""
    groups = [0, 0, 0, 1, 1, 1]
    small = [[1, 0.0], [0, 0.1], [0, 0.3], [1, 0.2], [1, 0.0], [0, 0.1]]
    large = [[a, 100 * b] for a, b in small]
    exact = {"eps": 0.0, "batch_eps": 0.0}
    torch.testing.assert_close(
        call("gdpo", small, groups, weights=(1.0, 0.5), **exact),
        call("gdpo", large, groups, weights=(1.0, 0.5), **exact),
    )
    grpo = call("group_norm", small, groups, weights=(1.0, 0.5))
    assert (grpo - call("group_norm", large, groups, weights=(1.0, 0.5))).abs().max() > 0.1
    torch.testing.assert_close(grpo, call("group_norm", [a + 0.5 * b for a, b in small], groups), atol=1e-12, rtol=0)


def test_rows_need_not_be_sorted_by_group():
    rewards, groups = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0], [0, 0, 0, 1, 1, 1]
    order = [4, 0, 3, 2, 5, 1]
    for name in SETTINGS:
        shuffled = call(name, [rewards[i] for i in order], [groups[i] * 10 - 3 for i in order])
        torch.testing.assert_close(shuffled, call(name, rewards, groups)[order])
