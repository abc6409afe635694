"""The constructor's errors, the shipped constants, the metrics, the KL in the reward and the entropy bonus."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lit_reason.errors import ConfigError, nearest
from lit_reason.objectives import CLIPS, Objective, check_group_size
from lit_reason.types import PolicyBatch

ALGORITHMS = Path(__file__).resolve().parents[2] / "conf" / "algorithm"
AXES = {
    "advantage": {"name": "group_norm", "eps": 1e-4, "ddof": 1},
    "ratio": "token",
    "clip": {"name": "ppo", "low": 0.2, "high": 0.28, "dual": None},
    "aggregation": "token_mean",
    "kl": {"name": "k3_loss", "weight": 0.0},
}
K1_REWARD = {"name": "k1_reward", "weight": 0.1}


def objective(**changes):
    return Objective(**(AXES | changes))


def make_batch(mask_BT, advantages_BT, rollout_BT=None, **given):
    ids_BT = torch.zeros(mask_BT.shape, dtype=torch.long)
    return PolicyBatch(
        ids_BT,
        ids_BT,
        mask_BT,
        advantages_BT,
        rollout_logprobs_BT=torch.full_like(mask_BT, math.nan) if rollout_BT is None else rollout_BT,
        group_tokens_B=mask_BT.sum().expand(len(mask_BT)),
        sequences_total=torch.tensor(float(len(mask_BT))),
        tokens_total=mask_BT.sum(),
        prompts_total=torch.tensor(1.0),
        max_completion=torch.tensor(8.0),
        **given,
    )


def load(name):
    config = OmegaConf.load(ALGORITHMS / f"{name}.yaml")
    assert config.pop("_target_") == "lit_reason.objectives.Objective"
    return Objective(**config), config


@pytest.mark.parametrize("name", [path.stem for path in sorted(ALGORITHMS.glob("*.yaml"))])
def test_yaml_loads_and_names_every_axis(name):
    built, config = load(name)
    axes = {"advantage", "ratio", "clip", "aggregation", "kl", "entropy_coef"}
    assert set(config) - {"critic", "distillation"} == axes
    assert built.needs_ref == (config.kl.weight > 0)
    assert not built.needs_entropy


def test_published_constants():
    """2402.03300 (beta 0.04), 2503.14476 (clip-higher 0.28, token mean), 2503.20783 (L_max), 2601.05242."""
    grpo, dr_grpo, dapo, gdpo = (load(name)[1] for name in ("grpo", "dr_grpo", "dapo", "gdpo"))
    assert (grpo.kl.name, grpo.kl.weight, grpo.aggregation) == ("k3_loss", 0.04, "seq_mean_token_mean")
    assert (dr_grpo.advantage.name, dr_grpo.aggregation, dr_grpo.kl.weight) == ("group_mean", "token_sum_norm", 0.0)
    assert (dapo.clip.low, dapo.clip.high, dapo.clip.dual, dapo.aggregation) == (0.2, 0.28, None, "token_mean")
    assert (gdpo.advantage.name, gdpo.advantage.batch_norm, gdpo.clip.high) == ("gdpo", "sequence", 0.28)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": "tokn"}, r"ratio: got 'tokn'; did you mean 'token'.*Type algorithm.ratio="),
        ({"aggregation": "token-mean"}, r"did you mean 'token_mean'"),
        ({"advantage": {"name": "gpdo"}}, r"advantage: got 'gpdo'; did you mean 'gdpo'.*algorithm.advantage.name="),
        ({"advantage": {"eps": 1e-4}}, r"advantage: got .*valid: one of .*gdpo, group_mean, "),
        (
            {"advantage": AXES["advantage"] | {"name": "group_mean"}},
            r"no setting 'eps', 'ddof'; valid: none. Type '~algorithm.advantage.eps' '~algorithm.advantage.ddof'",
        ),
        ({"clip": "ppo"}, r"Type 'algorithm.clip=\{name: ppo, low: VALUE, high: VALUE, dual: VALUE\}'"),
        ({"advantage": {"name": "group_norm", "eps": 1e-4}}, r"needs ddof.*\+algorithm.advantage.ddof=VALUE"),
        ({"clip": AXES["clip"] | {"hihg": 0.3}}, r"no setting 'hihg'; did you mean 'high'"),
        ({"clip": AXES["clip"] | {"high": "0.3"}}, r"clip.high: got '0.3' \(str\); valid: a finite number >= 0"),
        ({"clip": AXES["clip"] | {"low": -0.1}}, r"clip.low: got -0.1"),
        ({"clip": AXES["clip"] | {"low": math.nan}}, r"clip.low: got nan"),
        ({"advantage": AXES["advantage"] | {"ddof": 1.5}}, r"advantage.ddof: got 1.5 .*a whole number"),
        ({"kl": {"name": "k3_los", "weight": 0.1}}, r"kl.name: got 'k3_los'; did you mean 'k3_loss'"),
        ({"kl": {"name": "k3_loss"}}, r"'weight' is missing"),
        ({"kl": {"name": "k3_loss", "weight": 0.1, "beta": 0.1}}, r"kl: got key 'beta'"),
        ({"kl": {"name": "k3_loss", "weight": 0.0, "target": 0.1}}, r"target 0.1 with weight 0.0; valid: both above 0"),
        ({"entropy_target": 0.2, "entropy_step": 0.0}, r"entropy_target: got 0.2 with entropy_step 0.0"),
        ({"entropy_target": 0.0}, r"entropy_target: got 0.0"),
        ({"kl": {"name": "k3_loss", "weight": 0.1, "target": 0.0}}, r"target 0.0 with weight 0.1; valid: both above 0"),
        ({"kl": {"name": "k3_loss", "weight": 0.1, "rate": -1}}, r"kl.rate: got -1"),
        ({"entropy_coef": -1}, r"entropy_coef: got -1"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        objective(**changes)


def test_gdpo_batch_norm_names():
    settings = {"name": "gdpo", "eps": 1e-4, "ddof": 1, "batch_eps": 1e-4}
    objective(advantage=settings | {"batch_norm": None})
    with pytest.raises(ConfigError, match=r"advantage.batch_norm: got 'tokens'.*'sequence' or 'token' or null"):
        objective(advantage=settings | {"batch_norm": "tokens"})


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gdpo"])
def test_group_of_one_is_refused(name):
    built, _ = load(name)
    check_group_size(built, 2)
    with pytest.raises(ConfigError, match=r"loop.group_size: got 1; valid: 2 or more.*Type loop.group_size=8"):
        check_group_size(built, 1, key="loop.group_size")


def test_a_new_choice_is_one_function(monkeypatch):
    def soft(ratio_BT, advantages_BT, logprobs_BT, mask_BT, *, slope: float):
        return CLIPS["none"](slope * ratio_BT, advantages_BT, logprobs_BT, mask_BT)

    monkeypatch.setitem(CLIPS, "soft", soft)
    batch = make_batch(torch.ones(1, 2), torch.ones(1, 2))
    assert objective(clip={"name": "soft", "slope": 3.0}).loss(torch.zeros(1, 2), batch).loss.item() == -3.0


def test_pickles():
    batch = make_batch(torch.ones(1, 2), torch.ones(1, 2))
    copy = pickle.loads(pickle.dumps(objective()))
    assert copy.loss(torch.zeros(1, 2), batch).loss.item() == -1.0


def test_old_none_is_exactly_on_policy():
    mask_BT = torch.ones(2, 3)
    advantages_BT = torch.tensor([[1.0], [-0.5]]).expand(2, 3)
    new_BT = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = objective().loss(new_BT, make_batch(mask_BT, advantages_BT))
    (grad_BT,) = torch.autograd.grad(output.loss, new_BT)
    assert torch.equal(grad_BT, -advantages_BT / 6)
    assert output.metrics["ratio/q01"] == output.metrics["ratio/q99"] == 1


def test_kl_without_reference_is_refused():
    batch = make_batch(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ConfigError, match=r"got no reference values.*algorithm.kl.weight=0"):
        objective(kl=AXES["kl"] | {"weight": 0.1}).loss(torch.zeros(1, 2), batch)
    with pytest.raises(ConfigError, match="got no old values"):
        objective(kl=K1_REWARD).advantages(torch.ones(2, 1), torch.ones(1), torch.tensor([0, 0]), torch.ones(2, 2))


def test_kl_in_reward_is_taken_off_before_the_group_mean():
    """R = (1, 0), KL = (0.1 + 0.2, -0.4 [+ masked 9]) times 0.1: A = +-(0.97 - 0.04) / 2 by group_mean."""
    mask_BT = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    ref_BT = torch.tensor([[-1.0, -2.0], [-1.0, math.nan]])
    old_BT = ref_BT + torch.tensor([[0.1, 0.2], [-0.4, 9.0]])
    built = objective(advantage="group_mean", kl=K1_REWARD)
    got_BT = built.advantages(
        torch.tensor([[1.0], [0.0]]), torch.ones(1), torch.tensor([0, 0]), mask_BT, None, old_BT, ref_BT
    )
    assert built.needs_ref
    assert built.needs_old
    assert not objective(kl=AXES["kl"] | {"weight": 0.1}).needs_old
    assert got_BT[:, 0].tolist() == pytest.approx([0.465, -0.465], abs=1e-6)
    assert built.loss(old_BT, make_batch(mask_BT, got_BT)).loss.isfinite()  # no reference needed here


def test_kl_in_reward_is_a_constant_of_the_update():
    old_BT, ref_BT = torch.full((2, 2), -1.0).requires_grad_(), torch.full((2, 2), -2.0)
    got_BT = objective(advantage="group_mean", kl=K1_REWARD).advantages(
        torch.tensor([[1.0], [0.0]]), torch.ones(1), torch.tensor([0, 0]), torch.ones(2, 2), None, old_BT, ref_BT
    )
    assert not got_BT.requires_grad


def test_entropy_bonus_is_a_mean_over_the_step():
    """Two of three tokens count, three in the step: loss falls by coef * (2 + 4) / 3."""
    mask_BT = torch.tensor([[1.0, 1.0, 0.0]])
    batch = make_batch(mask_BT, torch.zeros(1, 3))
    batch.tokens_total = torch.tensor(3.0)
    entropy_BT = torch.tensor([[2.0, 4.0, math.nan]], requires_grad=True)
    output = objective(entropy_coef=0.5).loss(torch.zeros(1, 3), batch, entropy_BT)
    assert output.loss.item() == pytest.approx(-1.0)
    assert output.metrics["entropy"].item() == pytest.approx(3.0)
    assert not output.metrics["entropy"].requires_grad
    with pytest.raises(ConfigError, match=r"algorithm.entropy_coef=0"):
        objective(entropy_coef=0.5).loss(torch.zeros(1, 3), batch)


def test_metrics_by_hand():
    """Five tokens count. Ratios 0.5, 1, 1.5 (A < 0) and 0.5, 1.5 (A > 0): one cut below, one above."""
    ratio_BT = torch.tensor([[0.5, 1.0, 1.5, 7.0], [0.5, 1.5, 7.0, 7.0]])
    mask_BT = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    advantages_BT = torch.tensor([[-1.0], [1.0]]).expand(2, 4)
    old_BT = torch.full((2, 4), -1.0)
    new_BT = (old_BT + ratio_BT.log()).masked_fill(mask_BT == 0, math.nan).requires_grad_()
    rollout_BT = torch.tensor([[-1.5, math.nan, -1.0, 0.0], [-0.9, math.nan, 0.0, 0.0]])
    batch = make_batch(
        mask_BT, advantages_BT, rollout_BT, old_logprobs_BT=old_BT, ref_logprobs_BT=torch.full((2, 4), -1.2)
    )
    output = objective().loss(new_BT, batch)
    mean, square = output.metrics.pop("mismatch/ess").tolist()
    got = {name: value.item() for name, value in output.metrics.items()}
    assert output.tokens == 5
    assert all(value.dim() == 0 and not value.requires_grad for value in output.metrics.values())
    ratio_names = {"ratio/clip_low", "ratio/clip_high", "ratio/q01", "ratio/q99"}
    assert set(got) == ratio_names | {"kl/k1", "kl/k3", "mismatch/kl", "mismatch/max"}
    assert (got["ratio/clip_low"], got["ratio/clip_high"]) == pytest.approx((0.2, 0.2))
    assert (got["ratio/q01"], got["ratio/q99"]) == pytest.approx((0.5, 1.5))
    difference = [-0.2 - math.log(r) for r in (0.5, 1.0, 1.5, 0.5, 1.5)]  # ref - new
    assert got["kl/k1"] == pytest.approx(-sum(difference) / 5, abs=1e-6)
    assert got["kl/k3"] == pytest.approx(sum(math.exp(d) - d - 1 for d in difference) / 5, abs=1e-6)
    gaps = [0.5, 0.0, -0.1]  # old - rollout, the NaN left out
    assert got["mismatch/kl"] == pytest.approx(sum(math.exp(d) - d - 1 for d in gaps) / 3, abs=1e-6)
    assert got["mismatch/max"] == pytest.approx(0.5)
    weights = [math.exp(d) for d in gaps]
    assert (mean, square) == pytest.approx((sum(weights) / 3, sum(w * w for w in weights) / 3))


def test_micro_batch_without_tokens():
    """An all-failed micro-batch adds nothing, and its metrics cannot poison a weighted mean."""
    new_BT = torch.zeros(2, 3, requires_grad=True)
    batch = make_batch(torch.zeros(2, 3), torch.ones(2, 3))
    output = objective().loss(new_BT, batch)
    (grad_BT,) = torch.autograd.grad(output.loss, new_BT)
    assert output.loss == output.tokens == 0
    assert (grad_BT == 0).all()
    assert all(value.isfinite().all() for value in output.metrics.values())


def test_swapped_letters_are_offered_first():
    """Many algorithms are one letter from 'gpdo'; one has its letters."""
    names = ["cispo", "dapo", "dppo", "gdpo", "gmpo", "grpo", "gspo"]
    assert nearest("gpdo", names).startswith("did you mean 'gdpo' or ")
    assert nearest("gdppo", names).startswith("did you mean 'gdpo' or ")
