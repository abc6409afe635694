"""ReMax, GAE in the axis, KL-Cov, the value loss, distillation and the threshold of the correction, by hand."""

import math

import pytest
import torch

from lit_reason.errors import ConfigError, NonFiniteError
from lit_reason.objectives import ADVANTAGES, Objective, gae
from lit_reason.objectives.metrics import critic_metrics
from lit_reason.types import PolicyBatch

AXES = {"advantage": "none", "ratio": "token", "clip": "none", "aggregation": "token_mean"}
GAE = {"name": "gae", "gamma": 0.5, "lam": 0.5, "holes": "skip", "whiten_eps": None}
CRITIC = {"trunk": "separate", "lr_factor": 1.0, "loss_coef": 0.5, "clip": 0.2}
KL_COV = {"name": "kl_cov", "eps": 0.0, "ddof": 0, "fraction": 0.3}


def batch_of(mask_BT, advantages_BT, rollout_BT=None, **given):
    ids_BT, one = torch.zeros(mask_BT.shape, dtype=torch.long), torch.tensor(1.0)
    rollout_BT = torch.zeros_like(mask_BT) if rollout_BT is None else rollout_BT
    totals = (mask_BT.sum(1), one * len(mask_BT), mask_BT.sum(), one, 8 * one)
    return PolicyBatch(ids_BT, ids_BT, mask_BT, advantages_BT, rollout_BT, *totals, **given)


def assess(objective, rewards_BR, mask_BT, group_B=None, weights_R=None, **given):
    rewards_BR = torch.as_tensor(rewards_BR)
    weights_R = torch.ones(rewards_BR.shape[1]) if weights_R is None else torch.tensor(weights_R)
    group_B = torch.zeros(len(rewards_BR), dtype=torch.long) if group_B is None else torch.tensor(group_B)
    return objective.assess(rewards_BR, weights_R, group_B, torch.as_tensor(mask_BT), **given)


def test_remax_compares_with_the_greedy_completion():
    """Weights 2 and 1: (1 - 0) 2 + (0.5 - 1) 1 = 1.5; the second row failed, and its greedy with it."""
    objective = Objective(**AXES | {"advantage": "remax"})
    assert objective.needs_greedy and objective.min_group_size == 1
    rewards_BR = [[1.0, 0.5], [math.nan, 0.0], [0.0, 0.25]]
    greedy_BR = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [0.0, 1.0]])
    valid_B = torch.tensor([True, False, True])
    got = assess(objective, rewards_BR, [[1.0, 1.0]] * 3, weights_R=[2.0, 1.0], valid_B=valid_B, greedy_BR=greedy_BR)
    assert got.advantages.tolist() == [[1.5, 1.5], [0.0, 0.0], [-0.75, -0.75]]
    with pytest.raises(ConfigError, match="got no greedy reward values"):
        assess(objective, [[1.0]], [[1.0]])
    with pytest.raises(NonFiniteError, match="reward column 0 is nan in row 0"):
        assess(objective, [[1.0]], [[1.0]], greedy_BR=torch.tensor([[math.nan]]))


def test_remax_with_a_kl_in_the_reward_takes_it_off_the_samples_alone():
    """R = 1 - 0.5 (0.1 + 0.2), greedy 0.25."""
    objective = Objective(**AXES | {"advantage": "remax"}, kl={"name": "k1_reward", "weight": 0.5})
    ref_BT = torch.tensor([[-1.0, -2.0]])
    old_BT = ref_BT + torch.tensor([[0.1, 0.2]])
    greedy_BR = torch.tensor([[0.25]])
    got = assess(objective, [[1.0]], [[1.0, 1.0]], old_logprobs_BT=old_BT, ref_logprobs_BT=ref_BT, greedy_BR=greedy_BR)
    assert got.advantages[0].tolist() == pytest.approx([0.6, 0.6])


def test_no_advantage_at_all():
    assert assess(Objective(**AXES), [[3.0], [1.0]], torch.ones(2, 2)).advantages.tolist() == [[0.0, 0.0]] * 2


def test_gae_on_rewards_at_the_last_token():
    """gamma lam = 1/4. Row 0: R 2 at t = 2, V 1, 2, 0: delta 0, -2, 2, so A = -0.375, -1.5, 2. Row 1 ends at t = 1."""
    objective = Objective(**AXES | {"advantage": GAE}, critic=CRITIC)
    assert objective.needs_values
    values_BT = torch.tensor([[1.0, 2.0, 0.0], [4.0, 1.0, math.nan]])
    mask_BT = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    got = assess(objective, [[1.0, 1.0], [0.5, 1.0]], mask_BT, weights_R=[1.0, 1.0], values_BT=values_BT)
    # Row 1: R 1.5 at t = 1: delta -3.5, 0.5.
    assert got.advantages.tolist() == [[-0.375, -1.5, 2.0], [-3.375, 0.5, 0.0]]
    assert got.returns_BT.tolist() == [[0.625, 0.5, 2.0], [0.625, 1.5, 0.0]]
    with pytest.raises(ConfigError, match="got no critic values"):
        assess(objective, [[1.0]], [[1.0]])


def test_gae_with_a_kl_per_token_a_failed_row_and_whitening():
    """V = 0, gamma lam = 1/4, KL 0.5 (0.4, -0.2). A = -0.2 + 0.25 * 1.1, 1.1; whitened: -+ 1 / sqrt 2."""
    settings = {"kl": {"name": "k1_token_reward", "weight": 0.5}, "critic": CRITIC}
    ref_BT = torch.full((2, 2), -1.0)
    given = {
        "old_logprobs_BT": ref_BT + torch.tensor([[0.4, -0.2], [0.0, 0.0]]),
        "ref_logprobs_BT": ref_BT,
        "values_BT": torch.zeros(2, 2),
        "valid_B": torch.tensor([True, False]),
    }
    raw = assess(Objective(**AXES | {"advantage": GAE}, **settings), [[1.0], [9.0]], torch.ones(2, 2), **given)
    assert raw.advantages[0].tolist() == pytest.approx([0.075, 1.1])
    assert raw.returns_BT.flatten().tolist() == pytest.approx([0.075, 1.1, 0.0, 0.0])
    whitened = Objective(**AXES | {"advantage": GAE | {"whiten_eps": 0.0}}, **settings)
    got = assess(whitened, [[1.0], [9.0]], torch.ones(2, 2), **given)
    assert got.advantages[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    assert got.advantages[1].tolist() == [0.0, 0.0]
    assert got.returns_BT[0].tolist() == pytest.approx([0.075, 1.1]), "of the raw advantages"


@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_what_is_masked_does_not_reach_gae(holes):
    """One token of reward 2 and value 1 between what nobody may look at: A = 1, return 2."""
    wild_BT = torch.tensor([[math.nan, 0.0, math.nan]])
    mask_BT = torch.tensor([[0.0, 1.0, 0.0]])
    found = gae(wild_BT + torch.tensor([[0.0, 2.0, 0.0]]), wild_BT + 1, mask_BT, gamma=0.5, lam=0.5, holes=holes)
    assert [x_BT.tolist() for x_BT in found] == [[[0.0, 1.0, 0.0]], [[0.0, 2.0, 0.0]]]


def test_whitening_is_by_the_sample_variance():
    """V = 0 and gamma lam = 1/4: A of a reward of 16 is 1, 4, 16; mean 7, sample variance (36 + 9 + 81) / 2 = 63."""
    objective = Objective(**AXES | {"advantage": GAE | {"whiten_eps": 0.0}}, critic=CRITIC)
    got = assess(objective, [[16.0]], torch.ones(1, 3), values_BT=torch.zeros(1, 3))
    assert got.advantages[0].tolist() == pytest.approx([(a - 7) / math.sqrt(63) for a in (1, 4, 16)])


def test_metrics_leave_out_what_is_masked_and_take_sizes():
    """Ratios of 2 on the token that counts; the engine is 0.7 above the trainer on it."""
    old_BT, on_BT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    new_BT = old_BT + math.log(2.0)
    batch = batch_of(on_BT, torch.ones(1, 2), torch.tensor([[-0.3, 9.0]]), old_logprobs_BT=old_BT)
    got = Objective(**AXES).loss(new_BT, batch).metrics
    assert got["ratio/q01"].item() == got["ratio/q99"].item() == pytest.approx(2.0)
    assert got["mismatch/max"].item() == pytest.approx(0.7)


def test_what_an_objective_says_of_itself():
    gdpo = {"name": "gdpo", "eps": 1e-4, "ddof": 1, "batch_norm": None, "batch_eps": 1e-4}
    assert Objective(**AXES | {"advantage": gdpo}).per_reward and not Objective(**AXES).per_reward
    assert Objective(**AXES).has_ratio and not Objective(**AXES | {"clip": "reinforce"}).has_ratio


def test_kl_cov_marks_the_tokens_of_highest_covariance():
    """A = (1, -1); log p = -1, -3 | -2, -4.5, mean -2.625: cov 1.625, -0.375 | -0.625, 1.875; 0.3 of 4 is one."""
    old_BT, mask_BT = torch.tensor([[-1.0, -3.0, math.nan], [-2.0, -4.5, -9.0]]), torch.tensor([[1.0, 1, 0], [1, 1, 0]])

    def marked(fraction):
        objective = Objective(**AXES | {"advantage": KL_COV | {"fraction": fraction}})
        assert objective.needs_old and not objective.needs_ref
        got = assess(objective, [[1.0], [0.0]], mask_BT, old_logprobs_BT=old_BT)
        assert got.advantages.tolist() == [[1.0] * 3, [-1.0] * 3]
        return got.marked_BT.tolist()

    assert marked(0.3) == [[False] * 3, [False, True, False]] == marked(0.0), "at least one"
    assert marked(0.5) == [[True, False, False], [False, True, False]]
    assert marked(1.0) == [[True, True, False], [True, True, False]]


def test_kl_cov_pulls_marked_tokens_back():
    """A = 2, r = e^0.5, e^-0.5, coef 3: gradients -2 r + 3 and -2 r - 3 on marked tokens, -2 r on the third."""
    objective = Objective(**AXES | {"advantage": KL_COV, "clip": {"name": "kl_cov", "coef": 3.0}})
    old_BT = torch.tensor([[-1.0, -1.0, -1.0]])
    new_BT = (old_BT + torch.tensor([[0.5, -0.5, 0.5]])).requires_grad_()
    marked_BT = torch.tensor([[True, True, False]])
    batch = batch_of(torch.ones(1, 3), torch.full((1, 3), 2.0), old_logprobs_BT=old_BT, marked_BT=marked_BT)
    output = objective.loss(new_BT, batch)
    (gradient_BT,) = torch.autograd.grad(output.loss, new_BT)
    up, down = math.exp(0.5), math.exp(-0.5)
    assert output.loss.item() == pytest.approx((-2 * up + 1.5 - 2 * down + 1.5 - 2 * up) / 3)
    assert gradient_BT[0].tolist() == pytest.approx([(-2 * up + 3) / 3, (-2 * down - 3) / 3, -2 * up / 3])
    assert not output.metrics["ratio/clip_high"] and not output.metrics["ratio/clip_low"]
    with pytest.raises(ConfigError, match="got no mark values"):
        objective.loss(new_BT, batch_of(torch.ones(1, 3), torch.ones(1, 3), old_logprobs_BT=old_BT))
    with pytest.raises(ConfigError, match=r"clip: got 'kl_cov' with advantage 'none'.*Type algorithm=kl_cov"):
        Objective(**AXES | {"clip": {"name": "kl_cov", "coef": 1.0}})


def test_value_loss_beside_the_policys():
    """Returns 1, V 0.5 and 0.7, V_old 0.4: 0.5 (0.25, max(0.09, 0.16)), a mean over four tokens, times 0.5.

    The second value left the range of 0.2 around the old one: bounded at 0.6 the loss is larger, without gradient.
    """
    objective = Objective(**AXES | {"advantage": GAE}, critic=CRITIC)
    mask_BT = torch.tensor([[1.0, 1.0, 0.0]])
    batch = batch_of(
        mask_BT,
        torch.zeros(1, 3),
        values_BT=torch.tensor([[0.4, 0.4, math.nan]]),
        returns_BT=torch.tensor([[1.0, 1.0, math.nan]]),
    )
    batch.tokens_total = torch.tensor(4.0)
    values_BT = torch.tensor([[0.5, 0.7, math.nan]], requires_grad=True)
    output = objective.loss(torch.zeros(1, 3), batch, values_BT=values_BT)
    (gradient_BT,) = torch.autograd.grad(output.loss, values_BT)
    assert output.loss.item() == pytest.approx(0.5 * 0.5 * (0.25 + 0.16) / 4)
    assert gradient_BT[0].tolist() == pytest.approx([0.5 * -0.5 / 4, 0.0, 0.0])
    assert output.metrics["critic/loss"].item() == pytest.approx(0.5 * (0.25 + 0.16) / 2)
    moments = output.metrics["critic/explained_variance"].tolist()
    assert moments == pytest.approx([1.0, 1.0, 0.4, (0.25 + 0.09) / 2])
    for missing, message in (("values", "got no critic values"), ("returns", "got no return values")):
        lacking = batch_of(mask_BT, torch.zeros(1, 3), values_BT=batch.values_BT)
        with pytest.raises(ConfigError, match=message):
            objective.loss(torch.zeros(1, 3), lacking, values_BT=None if missing == "values" else values_BT)


def test_a_marked_ratio_that_underflowed_is_pulled_by_a_finite_amount():
    objective = Objective(**AXES | {"advantage": KL_COV, "clip": {"name": "kl_cov", "coef": 1.0}})
    new_BT = torch.tensor([[-200.0]], requires_grad=True)
    old_BT, marked_BT = torch.tensor([[-1.0]]), torch.tensor([[True]])
    batch = batch_of(torch.ones(1, 1), torch.ones(1, 1), old_logprobs_BT=old_BT, marked_BT=marked_BT)
    assert objective.loss(new_BT, batch).loss.isfinite()


def test_rows_that_failed_have_no_advantage_whatever_their_rewards():
    rewards_BR, valid_B = torch.tensor([[3.0], [5.0]]), torch.tensor([True, False])
    given = (rewards_BR, torch.ones(1), torch.zeros(2, dtype=torch.long), valid_B, torch.ones(2, 2))
    assert ADVANTAGES["remax"](*given, greedy_BR=torch.ones(2, 1)).tolist() == [2.0, 0.0]


def test_moments_of_the_critic():
    """R = 2, 3 and V = 1, 1: means 2.5, 6.5, 1.5, 2.5."""
    returns_BT, on_BT = torch.tensor([[2.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    got = critic_metrics(torch.ones(1, 3), returns_BT, returns_BT, on_BT)
    assert got["critic/explained_variance"].tolist() == [2.5, 6.5, 1.5, 2.5]


def test_distillation_leaves_the_policys_own_gradient():
    """A = 2 on one token: -2 of the policy's term beside the divergence's."""
    objective = Objective(**AXES, distillation={"beta": 0.5, "weight": 1.0})
    new_BT = torch.tensor([[-1.0]], requires_grad=True)
    batch = batch_of(torch.ones(1, 1), torch.full((1, 1), 2.0))
    loss = objective.loss(new_BT, batch, divergence_BT=torch.ones(1, 1)).loss
    assert torch.autograd.grad(loss, new_BT)[0].item() == -2.0


def test_distillation_is_one_more_loss_per_token():
    """Weight 3, divergences 0.5 and 0.25 of two tokens of four: 3 (0.75) / 4, and a gradient of 3 / 4 each."""
    objective = Objective(**AXES, distillation={"beta": 0.5, "weight": 3.0})
    assert objective.needs_teacher and objective.divergence_beta == 0.5 and not Objective(**AXES).needs_teacher
    batch = batch_of(torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(1, 3))
    batch.tokens_total = torch.tensor(4.0)
    divergence_BT = torch.tensor([[0.5, 0.25, math.nan]], requires_grad=True)
    output = objective.loss(torch.zeros(1, 3), batch, divergence_BT=divergence_BT)
    (gradient_BT,) = torch.autograd.grad(output.loss, divergence_BT)
    assert output.loss.item() == pytest.approx(0.5625)
    assert gradient_BT[0].tolist() == [0.75, 0.75, 0.0]
    assert output.metrics["distillation/divergence"].item() == pytest.approx(0.375)
    with pytest.raises(ConfigError, match="got no divergence values"):
        objective.loss(torch.zeros(1, 3), batch)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"beta": 0.5}, r"distillation: got the keys \['beta'\]; valid: beta and weight"),
        ({"beta": 1.5, "weight": 1.0}, "beta: got 1.5"),
        ({"beta": 0.5, "weight": "x"}, "distillation.weight: got 'x'"),
    ],
)
def test_wrong_distillation(spec, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**AXES, distillation=spec)


def test_a_corrected_kl_takes_the_tokens_ratio_whatever_the_surrogates():
    """d/dx = r (x - ref) with r of each token, though the surrogate's ratio is the sequence's; A = 0."""
    objective = Objective(**AXES | {"ratio": "sequence"}, kl={"name": "k3_is_corrected", "weight": 1.0})
    old_BT, ref_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.3, -1.0]])
    new_BT = torch.tensor([[-0.6, -2.2]], requires_grad=True)
    batch = batch_of(torch.ones(1, 2), torch.zeros(1, 2), old_logprobs_BT=old_BT, ref_logprobs_BT=ref_BT)
    (gradient_BT,) = torch.autograd.grad(objective.loss(new_BT, batch).loss, new_BT)
    expected = [math.exp(0.4) * 0.7 / 2, math.exp(-0.2) * -1.2 / 2]
    assert gradient_BT[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clip": {"name": "gmpo", "low": 0.4, "high": 0.4}, "ratio": "sequence"},
            "ratio: got 'sequence' with clip 'gmpo'",
        ),
        ({"kl": {"name": "k1_reward", "weight": 0.1}}, "a KL in the reward with advantage 'none'"),
        (
            {
                "advantage": {"name": "maxrl", "eps": 1e-6, "baseline": "group_mean"},
                "kl": {"name": "k1_reward", "weight": 0.1},
            },
            "a KL in the reward with advantage 'maxrl'",
        ),
        ({"advantage": GAE, "critic": CRITIC | {"lr_factor": 0}}, "critic.lr_factor: got 0; valid: above 0"),
    ],
)
def test_pairs_that_would_learn_nothing(changes, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**AXES | changes)


def test_which_advantages_compare_within_a_group():
    assert not Objective(**AXES).compares
    assert Objective(**AXES | {"advantage": "rloo"}).compares
    assert not Objective(**AXES | {"advantage": "remax"}).compares


@pytest.mark.parametrize(("kl", "factor"), [(0.2, 2.0), (0.1, 1.0), (0.0, 1.0)])
def test_a_correction_above_a_threshold_acts_in_rounds_beyond_it(kl, factor):
    """rho = e^1 cut to 2 if the round's mismatch is above 0.1 nats, 1 otherwise: loss -A rho."""
    spec = {"name": "truncate", "level": "token", "high": 2.0, "above": 0.1}
    objective = Objective(**AXES, correction=spec)
    assert objective.needs_old
    old_BT = torch.tensor([[-1.0]])
    given = {"old_logprobs_BT": old_BT, "mismatch_kl": torch.tensor(kl)}
    output = objective.loss(old_BT, batch_of(torch.ones(1, 1), torch.ones(1, 1), old_BT - 1, **given))
    assert output.loss.item() == pytest.approx(-factor)
    assert output.metrics["correction/cut"] == (factor != 1), "of what acts"
    with pytest.raises(ConfigError, match="got no mismatch values"):
        objective.loss(old_BT, batch_of(torch.ones(1, 1), torch.ones(1, 1), old_BT - 1, old_logprobs_BT=old_BT))
