"""Clip edges, fully masked rows, aggregations and overflow against reference numbers."""

import math

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.objectives import AGGREGATIONS, CLIPS, KL_TERMS, RATIOS, Objective
from lit_reason.objectives.ratio import safe_exp
from lit_reason.types import PolicyBatch

# The reference's names of aggregations.
GOLDEN_NAMES = {
    "seq-mean-token-mean": "seq_mean_token_mean",
    "token-mean": "token_mean",
    "prompt-mean-token-mean": "prompt_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "token_sum_norm",
    "token-sum-over-lmax": "token_sum_over_max",
    "token-sum": "token_sum",
}
CLIP_SETTINGS = {
    "ppo_0.2": {"low": 0.2, "high": 0.2, "dual": None},
    "dapo_0.2_0.28": {"low": 0.2, "high": 0.28, "dual": None},
    "dual_clip_c3": {"low": 0.2, "high": 0.2, "dual": 3.0},
    "dual_clip_c10": {"low": 0.2, "high": 0.28, "dual": 10.0},
}


def make_batch(mask_BT, advantages_BT, group_B=None, max_completion=10.0, sequences=None, **given):
    group_B = torch.zeros(len(mask_BT), dtype=torch.long) if group_B is None else group_B
    length_B = mask_BT.sum(1)
    ids_BT = torch.zeros(mask_BT.shape, dtype=torch.long)
    return PolicyBatch(
        ids_BT,
        ids_BT,
        mask_BT,
        advantages_BT,
        rollout_logprobs_BT=given.pop("rollout", torch.full_like(mask_BT, math.nan)),
        group_tokens_B=torch.stack([length_B[group_B == g].sum() for g in group_B]),
        sequences_total=torch.tensor(float(len(mask_BT) if sequences is None else sequences)),
        tokens_total=length_B.sum(),
        prompts_total=torch.tensor(float(len(group_B.unique()))),
        max_completion=torch.tensor(max_completion),
        **given,
    )


def objective(**changes):
    axes = {
        "advantage": {"name": "group_norm", "eps": 1e-4, "ddof": 1},
        "ratio": "token",
        "clip": {"name": "ppo", "low": 0.2, "high": 0.2, "dual": None},
        "aggregation": "token_mean",
    }
    return Objective(**(axes | changes))


@pytest.mark.parametrize("key", sorted(CLIP_SETTINGS))
def test_clip_edges(golden, key):
    for case in golden("edge_cases.json")["cases"]["clip_edges"]["cases"]:
        old = torch.tensor([[-3.0]], dtype=torch.float64)
        new = (old + math.log(case["ratio"])).requires_grad_()
        advantage = torch.tensor([[case["A"]]], dtype=torch.float64)
        ratio = RATIOS["token"](new, old, torch.ones_like(old))
        loss = CLIPS["ppo"](ratio, advantage, new, torch.ones_like(old), **CLIP_SETTINGS[key]).loss_BT.sum()
        (grad,) = torch.autograd.grad(loss, new)
        assert loss.item() == pytest.approx(case[key]["loss"], abs=1e-12), case
        assert grad.item() == pytest.approx(case[key]["grad"], abs=1e-12), case


@pytest.mark.parametrize("name", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("empty", ["count", "drop"])
def test_fully_masked_row(golden, name, empty):
    """Counting the empty row in `sequences_total` or not is the caller's choice; neither gives NaN."""
    case = golden("edge_cases.json")["cases"]["fully_masked_sequence"]
    inputs, expected = golden("batch_main.json")["inputs"], case["results"][f"{name}|{empty}"]
    mask_BT, new_BT, old_BT = (
        torch.tensor(v, dtype=torch.float64) for v in (case["mask"], inputs["new"], inputs["old"])
    )
    group_B = torch.tensor(inputs["groups"])
    chosen = objective(aggregation=GOLDEN_NAMES[name])
    advantages_BT = chosen.advantages(
        torch.tensor(inputs["rewards"], dtype=torch.float64),
        torch.tensor(inputs["weights"], dtype=torch.float64),
        group_B,
        mask_BT,
    )
    batch = make_batch(
        mask_BT, advantages_BT, group_B, sequences=12 if empty == "count" else 11, old_logprobs_BT=old_BT
    )
    output = chosen.loss(new_BT.requires_grad_(), batch)
    (grad_BT,) = torch.autograd.grad(output.loss, new_BT)
    assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-12)
    expected_BT = torch.tensor(expected["grad_wrt_new_logprobs"], dtype=torch.float64)
    assert (grad_BT - expected_BT).abs().max() < 1e-12


def test_every_aggregation(golden):
    """sum W l, with the reference's per-token losses as l (through -r A with r = 1 and A = -l)."""
    case = golden("edge_cases.json")["cases"]["aggregation"]
    group_B = torch.tensor(golden("batch_main.json")["inputs"]["groups"])
    mask_BT, loss_BT = (torch.tensor(case[key], dtype=torch.float64) for key in ("mask", "per_token_loss"))
    batch = make_batch(mask_BT, -loss_BT, group_B, max_completion=float(case["l_max"]))
    for golden_name, name in GOLDEN_NAMES.items():
        got = objective(clip="none", aggregation=name).loss(torch.zeros_like(mask_BT), batch).loss
        assert got.item() == pytest.approx(case["value"][golden_name], abs=1e-12), name
    assert sorted(GOLDEN_NAMES.values()) == sorted(AGGREGATIONS)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_gradients_on_policy(golden, name):
    """Exact enumeration over five tokens: which KL each estimator pulls along, as a loss."""
    data = golden("kl_entropy_gkd.json")
    theta = torch.tensor(data["theta"], dtype=torch.float64, requires_grad=True)
    log_p, log_ref = (t.log_softmax(0) for t in (theta, torch.tensor(data["theta_ref"], dtype=torch.float64)))
    kl = KL_TERMS[f"{name}_loss"].estimator(log_p, log_ref, torch.ones(5))
    expected = data["on_policy"][name]
    assert (log_p.exp() * kl).sum().item() == pytest.approx(expected["expected_value"], abs=1e-12)
    (grad,) = torch.autograd.grad((log_p.exp().detach() * kl).sum(), theta)
    assert grad.tolist() == pytest.approx(expected["expected_gradient_as_loss"], abs=1e-12)


def test_corrected_k3_gives_the_reverse_kl_off_policy(golden):
    data = golden("kl_entropy_gkd.json")
    theta = torch.tensor(data["theta"], dtype=torch.float64, requires_grad=True)
    log_p = theta.log_softmax(0)
    log_ref, log_old = (torch.tensor(data[k], dtype=torch.float64).log_softmax(0) for k in ("theta_ref", "theta_old"))
    kl = KL_TERMS["k3_is_corrected"].estimator(log_p, log_ref, (log_p - log_old).exp())
    (grad,) = torch.autograd.grad((log_old.exp() * kl).sum(), theta)
    assert grad.tolist() == pytest.approx(data["on_policy"]["k2"]["expected_gradient_as_loss"], abs=1e-12)


@pytest.mark.parametrize("ratio", sorted(RATIOS))
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_overflows_gives_no_nan(ratio, advantage):
    """exp(200) is inf in float32: clipped in value, but its backward would be 0 * inf."""
    new = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-401.0, -2.0]])
    batch = make_batch(torch.ones(1, 2), torch.full((1, 2), advantage), old_logprobs_BT=old, ref_logprobs_BT=-old)
    output = objective(ratio=ratio, kl={"name": "k3_loss", "weight": 0.1}).loss(new, batch)
    (grad,) = torch.autograd.grad(output.loss, new)
    assert output.loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_is_bounded_where_its_square_would_overflow(dtype):
    largest = math.log(torch.finfo(dtype).max)
    below, above = torch.tensor([0.49 * largest, -1.0], dtype=dtype), torch.tensor([0.51 * largest, 1e6], dtype=dtype)
    assert torch.equal(safe_exp(below), below.exp())
    assert safe_exp(above).square().isfinite().all()


def test_dual_clip_below_one_is_refused_at_construction():
    with pytest.raises(ConfigError, match=r"clip.dual: got 0.5; valid: null or a number above 1"):
        objective(clip={"name": "ppo", "low": 0.2, "high": 0.2, "dual": 0.5})
