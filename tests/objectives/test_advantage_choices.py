"""Baselines, whitening over tokens, and pass@k, by hand and by enumeration of subsets."""

import itertools
import math
import statistics

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.objectives import ADVANTAGES, Objective, check_group_size
from lit_reason.types import PolicyBatch

D = torch.float64
FLOOR = {"eps": 1e-8, "eps_rule": "floor", "ddof": 0}


def call(name, rewards, groups=None, penalty=None, mask=None, **settings):
    rewards_BR = torch.tensor(rewards, dtype=D)[:, None]
    mask_BT = torch.ones(len(rewards), 2, dtype=D) if mask is None else torch.tensor(mask, dtype=D)
    group_B = torch.zeros(len(rewards), dtype=torch.long) if groups is None else torch.tensor(groups)
    extra = () if penalty is None else (torch.tensor(penalty, dtype=D),)
    valid_B = torch.ones(len(rewards), dtype=torch.bool)
    return ADVANTAGES[name](rewards_BR, torch.ones(1, dtype=D), group_B, valid_B, mask_BT, *extra, **settings).tolist()


def test_reinforce():
    assert call("reinforce", [3.0, 0.0, 0.0], [0, 1, 1], baseline="batch_mean") == pytest.approx([2.0, -1.0, -1.0])
    assert call("reinforce", [3.0, 0.0, 0.0], [0, 1, 1], baseline=None) == [3.0, 0.0, 0.0]


def test_rloo_is_the_mean_of_the_others():
    rewards, groups = [1.0, 0.0, 5.0, 2.0, 7.0], [0, 0, 0, 1, 1]
    assert call("rloo", rewards, groups) == pytest.approx([1 - 2.5, 0 - 3.0, 5 - 0.5, -5.0, 5.0])


def test_batch_std_is_of_the_raw_rewards():
    """Groups (0, 2) and (10, 12): centred all are 1, the raw sample std is that of the four numbers."""
    std = statistics.stdev([0.0, 2.0, 10.0, 12.0])
    got = call("group_mean_batch_std", [0.0, 2.0, 10.0, 12.0], [0, 0, 1, 1], eps=0.5, ddof=1)
    assert got == pytest.approx([-1 / (std + 0.5), 1 / (std + 0.5)] * 2)


def test_batch_std_of_two():
    """0 and 2: mean 1, sample std sqrt 2, population std 1."""
    for ddof, std in ((1, math.sqrt(2)), (0, 1.0)):
        got = call("group_mean_batch_std", [0.0, 2.0], eps=0.0, ddof=ddof)
        assert got == pytest.approx([-1 / std, 1 / std])


def test_reinforce_pp_sums_the_penalty_that_is_to_come():
    """Returns 1 + (0.1, 0.3), 1 + 0.3 and 0 - 0.2; population std over the three tokens that count."""
    mask, penalty = [[1.0, 1.0], [1.0, 0.0]], [[0.1, 0.3], [-0.2, 0.0]]
    returns = [1.4, 1.3, -0.2]
    mean, std = statistics.mean(returns), statistics.pstdev(returns)
    got = call("reinforce_pp", [1.0, 0.0], penalty=penalty, mask=mask, **FLOOR)
    assert got[0] + got[1][:1] == pytest.approx([(r - mean) / std for r in returns])
    assert got[1][1] == 0
    sample = math.sqrt(statistics.variance(returns) + 0.5)
    got = call("reinforce_pp", [1.0, 0.0], penalty=penalty, mask=mask, eps=0.5, eps_rule="add", ddof=1)
    assert got[0] + got[1][:1] == pytest.approx([(r - mean) / sample for r in returns])


def test_reinforce_pp_floor_bounds_the_variance():
    got = call("reinforce_pp", [1.0, 0.0], eps=4.0, eps_rule="floor", ddof=0)
    assert got == [pytest.approx([0.25] * 2), pytest.approx([-0.25] * 2)]  # +-0.5 / sqrt(max(0.25, 4))


def test_whitening_of_two_tokens_and_of_none():
    """0 and 2: +-1 over the sample std sqrt 2."""
    settings = {"eps": 0.0, "eps_rule": "add", "ddof": 1}
    got = call("reinforce_pp", [0.0, 2.0], mask=[[1.0, 0.0], [0.0, 1.0]], **settings)
    assert got == [pytest.approx([-math.sqrt(0.5), 0.0]), pytest.approx([0.0, math.sqrt(0.5)])]
    assert call("reinforce_pp", [0.0, 2.0], mask=[[0.0, 0.0]] * 2, **settings) == [[0.0, 0.0]] * 2


def test_reinforce_pp_baseline_centres_in_the_group_first():
    """Groups (10, 12) and (0, 2) with one token each: +-1, already white."""
    got = call("reinforce_pp_baseline", [10.0, 12.0, 0.0, 2.0], [0, 0, 1, 1], mask=[[1.0]] * 4, **FLOOR)
    assert [row[0] for row in got] == pytest.approx([-1.0, 1.0, -1.0, 1.0])


def test_distill_is_the_penalty_itself():
    penalty = [[0.5, -1.0, 2.0]]
    mask = [[1.0, 1.0, 1.0]]
    assert call("distill", [9.0], penalty=penalty, mask=mask, discount=0.0) == penalty
    assert call("distill", [9.0], penalty=penalty, mask=mask, discount=0.5)[0] == pytest.approx([0.5, 0.0, 2.0])
    assert call("distill", [9.0], penalty=penalty, mask=mask, discount=1.0)[0] == pytest.approx([1.5, 1.0, 2.0])
    assert call("distill", [9.0], penalty=[[0.5]], mask=[[1.0]], discount=0.5) == [[0.5]]
    with pytest.raises(ConfigError, match="k1_token_reward"):
        call("distill", [9.0], mask=mask, discount=0.0)


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_distill_leaves_failed_rows_out(discount):
    two_BR, valid_B = torch.ones(2, 1, dtype=D), torch.tensor([True, False])
    penalty_BT = torch.tensor([[0.5], [0.25]], dtype=D)
    group_B = torch.zeros(2, dtype=torch.long)
    got = ADVANTAGES["distill"](two_BR, two_BR[0], group_B, valid_B, two_BR, penalty_BT, discount=discount)
    assert got.tolist() == [[0.5], [0.0]]


def test_correct_is_what_reaches_the_threshold_although_weights_are_rounded():
    """Two rewards of 1 with the float32 weights 0.9 and 0.1, whose sum is below 1."""
    weights = torch.tensor([0.9, 0.1])
    assert weights.double().sum() < 1
    rewards_BR = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    made = Objective({"name": "pkpo", "k": 2, "threshold": 1.0, "baseline": None}, "token", "none", "token_mean")
    got = made.advantages(rewards_BR, weights, torch.zeros(3, dtype=torch.int64), torch.ones(3, 1))
    assert got[:, 0].tolist() == pytest.approx([2.0, 1.0, 1.0])  # 2 (1 - C(1, 1) / C(2, 1)) = 1


@pytest.mark.parametrize(
    ("advantage", "said"),
    [
        ({"name": "pkpo", "k": 0, "threshold": 1.0, "baseline": None}, "got 0 for 'pkpo'; valid: 1 or more"),
        ({"name": "passk", "k": 0, "threshold": 1.0}, "got 0 for 'passk'"),
        ({"name": "distill", "discount": 0.0}, "k1_token_reward"),
    ],
)
def test_what_would_train_on_nothing_is_refused_when_it_is_built(advantage, said):
    with pytest.raises(ConfigError, match=said):
        Objective(advantage, "token", "none", "token_mean")


def test_maxrl_without_a_baseline_learns_from_one_completion():
    for baseline, least in ((None, 1), ("group_mean", 2)):
        advantage = {"name": "maxrl", "eps": 1e-6, "baseline": baseline}
        assert Objective(advantage, "token", "none", "token_mean").min_group_size == least


def test_maxrl():
    """Mean 1/4: (1 - 1/4) / (1/4 + eps). Nothing rewarded, or a mean that is not positive, is 0."""
    assert call("maxrl", [1.0, 0.0, 0.0, 0.0], eps=0.25, baseline="group_mean") == pytest.approx(
        [1.5, -0.5, -0.5, -0.5]
    )
    assert call("maxrl", [1.0, 0.0, 0.0, 0.0], eps=0.0, baseline=None) == pytest.approx([4.0, 0.0, 0.0, 0.0])
    assert call("maxrl", [1.0], eps=0.0, baseline=None) == [1.0]
    for baseline in (None, "group_mean"):
        assert call("maxrl", [0.0, 0.0], eps=0.0, baseline=baseline) == [0.0, 0.0]
        assert call("maxrl", [1.0, -1.0], eps=0.0, baseline=baseline) == [0.0, 0.0]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("correct", range(6))
def test_pkpo_by_enumeration(k, correct):
    """n (1 / C(n, k)) sum over the k-sets that hold i of max(set) [- max(set without i)]."""
    n, rewards = 5, [1.0] * correct + [0.0] * (5 - correct)
    for baseline in (None, "leave_one_out_minus_one"):
        expected = []
        for i in range(n):
            others = [rewards[j] for j in range(n) if j != i]
            sets = list(itertools.combinations(others, k - 1))
            minus = [max(s, default=0.0) if baseline else 0.0 for s in sets]
            gain = sum(max((*s, rewards[i])) - m for s, m in zip(sets, minus, strict=True))
            expected.append(n * gain / math.comb(n, k))
        assert call("pkpo", rewards, k=k, threshold=0.5, baseline=baseline) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("correct", range(6))
def test_passk_by_enumeration(k, correct):
    """The mean, over the k-sets that hold i, of max(set) normalised over all k-sets."""
    n, rewards = 5, [1.0] * correct + [0.0] * (5 - correct)
    best = {s: max(rewards[j] for j in s) for s in itertools.combinations(range(n), k)}
    mean, std = statistics.mean(best.values()), statistics.pstdev(best.values())
    expected = [statistics.mean((b - mean) / std if std else 0.0 for s, b in best.items() if i in s) for i in range(n)]
    assert call("passk", rewards, k=k, threshold=0.5) == pytest.approx(expected, abs=1e-12)


def test_a_group_too_small_for_k_is_silent_and_refused():
    for name, smallest, extra in (("pkpo", 3, {"baseline": None}), ("passk", 4, {})):
        settings = {"k": 3, "threshold": 1.0} | extra
        assert call(name, [1.0, 0.0], **settings) == [0.0, 0.0]
        assert any(call(name, [1.0, *[0.0] * (smallest - 1)], **settings))
        built = Objective({"name": name} | settings, "token", "none", "token_mean")
        check_group_size(built, smallest)
        with pytest.raises(ConfigError, match=f"valid: {smallest} or more"):
            check_group_size(built, smallest - 1)


@pytest.mark.parametrize("name", ["pkpo", "passk"])
def test_a_failed_row_is_neither_correct_nor_sampled(name):
    """Whatever its reward: three valid rows of a group, one of them correct."""
    settings = {"k": 2, "threshold": 1.0} | ({"baseline": None} if name == "pkpo" else {})
    rewards_BR, valid_B = torch.tensor([[1.0], [0.0], [7.0], [0.0]], dtype=D), torch.tensor([True, True, False, True])
    got = ADVANTAGES[name](
        rewards_BR, torch.ones(1, dtype=D), torch.zeros(4, dtype=torch.long), valid_B, torch.ones(4, 1), **settings
    )
    assert got[valid_B].tolist() == pytest.approx(call(name, [1.0, 0.0, 0.0], **settings))
    assert got[2] == 0


@pytest.mark.parametrize(("name", "smallest"), [("rloo", 2), ("reinforce", 1), ("reinforce_pp", 1)])
def test_smallest_group(name, smallest):
    settings = {"rloo": {}, "reinforce": {"baseline": None}, "reinforce_pp": FLOOR}[name]
    assert Objective({"name": name} | settings, "token", "none", "token_mean").min_group_size == smallest


def token_reward(advantage):
    kl = {"name": "k1_token_reward", "weight": 0.5}
    return Objective(advantage, "token", "none", "token_mean", kl)


def test_kl_per_token_reaches_the_advantage_with_its_weight_and_sign():
    """-0.5 (old - ref), the masked NaN left out; the reference is needed before the update, not in the loss."""
    built = token_reward({"name": "distill", "discount": 0.0})
    old_BT, ref_BT = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.4, -1.0, math.nan]])
    mask_BT = torch.tensor([[1.0, 1.0, 0.0]])
    got_BT = built.advantages(torch.ones(1, 1), torch.ones(1), torch.tensor([0]), mask_BT, None, old_BT, ref_BT)
    assert got_BT[0].tolist() == pytest.approx([-0.2, 0.5, 0.0])
    assert built.needs_ref and built.needs_old
    ids_BT, one = torch.zeros(1, 3, dtype=torch.long), torch.tensor(1.0)
    batch = PolicyBatch(ids_BT, ids_BT, mask_BT, got_BT, old_BT, 2 * one[None], one, 2 * one, one, one)
    assert built.loss(old_BT, batch).loss.item() == pytest.approx(-0.15)


def test_kl_per_token_is_refused_where_nothing_takes_it():
    with pytest.raises(
        ConfigError, match=r"'k1_token_reward' with advantage 'rloo'.*valid with it: gae, reinforce_pp, distill"
    ):
        token_reward("rloo")


def test_clip_cov_silences_tokens_of_high_covariance():
    """A = (1, -1) by the population std; log p = -1, -3 | -2, -4, mean -2.5. cov = 1.5, -0.5 | -0.5, 1.5."""
    settings = {"name": "clip_cov", "eps": 0.0, "ddof": 0}
    old_BT, mask_BT = torch.tensor([[-1.0, -3.0, math.nan], [-2.0, -4.0, -9.0]]), torch.tensor([[1.0, 1, 0], [1, 1, 0]])

    def advantages(**bounds):
        built = Objective(settings | bounds, "token", "none", "token_mean")
        assert built.needs_old and not built.needs_ref
        got_BT = built.advantages(
            torch.tensor([[1.0], [0.0]]), torch.ones(1), torch.tensor([0, 0]), mask_BT, None, old_BT
        )
        return got_BT.tolist()

    plain = [[1.0] * 3, [-1.0] * 3]
    assert advantages(low=1.0, high=2.0, fraction=0.5) == [[0.0, 1.0, 1.0], [-1.0, 0.0, -1.0]]
    assert sum(map(abs, itertools.chain(*advantages(low=1.0, high=2.0, fraction=0.49)))) == 5  # one of the two
    assert advantages(low=1.0, high=2.0, fraction=0.24) == plain
    assert advantages(low=1.5, high=1.5, fraction=0.5) == [[0.0, 1.0, 1.0], [-1.0, 0.0, -1.0]]  # bounds inside
    assert advantages(low=1.6, high=2.0, fraction=1.0) == plain
    assert advantages(low=0.0, high=1.4, fraction=1.0) == plain
    assert advantages(low=2.4, high=2.6, fraction=1.0) == plain  # a masked token's 0 would have 2.5


def test_clip_cov_takes_both_means_over_tokens():
    """A = (1, -1) on two tokens and one, mean 1/3; log p = -1, -3 | -2, mean -2: cov = 2/3, -2/3 | 0."""
    built = Objective(
        {"name": "clip_cov", "eps": 0.0, "ddof": 0, "low": 0.6, "high": 0.7, "fraction": 1.0},
        "token",
        "none",
        "token_mean",
    )
    got_BT = built.advantages(
        torch.tensor([[1.0], [0.0]]),
        torch.ones(1),
        torch.tensor([0, 0]),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        None,
        torch.tensor([[-1.0, -3.0], [-2.0, -7.0]]),
    )
    assert got_BT.tolist() == [[0.0, 1.0], [-1.0, -1.0]]


def test_clip_cov_of_a_single_token_is_zero():
    settings = {"name": "clip_cov", "eps": 0.0, "ddof": 0, "low": 0.0, "high": 0.0, "fraction": 1.0}
    got_BT = Objective(settings, "token", "none", "token_mean").advantages(
        torch.tensor([[1.0], [0.0]]),
        torch.ones(1),
        torch.tensor([0, 0]),
        torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        None,
        torch.tensor([[-1.0, -3.0], [-2.0, -7.0]]),
    )
    assert got_BT.tolist() == [[1.0, 0.0], [-1.0, -1.0]]


def test_clip_cov_without_log_probs_is_refused():
    built = Objective(
        {"name": "clip_cov", "eps": 0.0, "ddof": 0, "low": 1.0, "high": 5.0, "fraction": 0.1},
        "token",
        "none",
        "token_mean",
    )
    with pytest.raises(ConfigError, match=r"got no old values.*another algorithm.advantage"):
        built.advantages(torch.ones(2, 1), torch.ones(1), torch.tensor([0, 0]), torch.ones(2, 2))
