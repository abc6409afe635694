"""The policy module under a real Trainer."""

import math
from pathlib import Path

import pytest
import torch

from lit_reason.data import ByteTokenizer, PromptCursor
from lit_reason.errors import CheckpointError, ConfigError, NonFiniteError
from lit_reason.loop import RolloutLoop, RoundShape, Stages
from lit_reason.models.checksum import checksum
from lit_reason.modules import PolicyModule, token_logprobs
from lit_reason.modules.policy import REFERENCE_KEY
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.rollout import BuiltinEngine, Sampling
from lit_reason.types import Prompt

NAMES = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "algorithm").glob("*.yaml"))


@pytest.mark.parametrize("algorithm", NAMES)
def test_a_step_has_the_same_gradient_in_any_number_of_micro_batches(algorithm, make_policy, micro_batches, fit):
    steps, metrics = [], []
    for n in (1, 2, 4, 8):
        policy = make_policy(algorithm, temperature=0.8)
        record = fit(policy, micro_batches(policy, n), accumulate=n)
        assert len(record.steps) == 1
        steps.append(record.steps[0])
        metrics.append(record.metrics[0])
    for other, logged in zip(steps[1:], metrics[1:], strict=True):
        for name, gradient in steps[0].items():
            error = (other[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
            assert error < 1e-5, (name, float(error))
        assert logged.keys() == metrics[0].keys()
        for name, value in metrics[0].items():  # averaged over micro-batches, not the last one's
            if not name.startswith("ratio/q"):  # quantiles do not average
                assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert len(steps[0]) == sum(p.requires_grad for p in make_policy(algorithm).parameters())


def test_multi_token_prediction_is_frozen(make_model, micro_batches, fit):
    model = make_model(mtp_depth=1)
    objective = Objective("group_mean", "token", "none", "token_mean")
    policy = PolicyModule(model, AdamW(lr=0.01), objective)
    before = [p.clone() for p in model.mtp.parameters()]
    record = fit(policy, micro_batches(policy, 1))
    assert record.steps[0] and not any("mtp" in name for name in record.steps[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.mtp.parameters(), strict=True))


def test_the_columns_of_a_step(make_policy, micro_batches, fit):
    policy = make_policy("grpo")
    (batch,) = micro_batches(policy, 1)
    with torch.no_grad():
        new, entropy = token_logprobs(policy.model, batch, 1.0)
    logged = fit(policy, [batch]).metrics[0]
    on = batch.mask_BT > 0
    log_ratio = (new - batch.ref_logprobs_BT)[on].double()
    assert logged["kl/k1"] == pytest.approx(log_ratio.mean().item(), rel=1e-4)
    assert logged["kl/k3"] == pytest.approx(((-log_ratio).exp() - 1 + log_ratio).mean().item(), rel=1e-4)
    assert logged["entropy"] == pytest.approx(entropy[on].mean().item(), rel=1e-5)
    gap = (batch.old_logprobs_BT - batch.rollout_logprobs_BT)[on].double()
    assert logged["mismatch/kl"] == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=1e-4)
    assert 0 < logged["ratio/clip_low"] < 1 and 0 < logged["ratio/clip_high"] < 1
    assert math.isfinite(logged["loss"])


@torch.no_grad()
def test_token_log_probs_and_entropy_by_the_full_forward(make_policy, round_batch):
    policy = make_policy()
    got, entropy = token_logprobs(policy.model, round_batch, temperature=0.7)
    table = (policy.model(round_batch.input_ids_BT) / 0.7).log_softmax(-1)
    on = round_batch.mask_BT > 0
    expected = table.gather(2, round_batch.target_ids_BT[..., None]).squeeze(2)
    torch.testing.assert_close(got[on], expected[on], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy[on], -(table.exp() * table).sum(-1)[on], atol=1e-5, rtol=0)
    assert not got[~on].any() and not entropy[~on].any()


def test_the_reference_is_frozen_and_outside_the_checkpoint(make_policy, micro_batches, fit):
    policy = make_policy(lr=0.05)
    with policy.reference.model() as reference:
        before = checksum(reference)
        fit(policy, micro_batches(policy, 2), accumulate=2)
        assert checksum(policy.model) != before == checksum(reference)
        policy.train()
        assert not any(m.training for m in reference.modules())
        assert not any(p.requires_grad for p in reference.parameters())
    assert set(policy.state_dict()) == {f"model.{name}" for name in policy.model.state_dict()}
    assert len(list(policy.parameters())) == len(list(policy.model.parameters()))


def test_the_checkpoint_names_its_reference_and_refuses_another(make_policy, micro_batches, fit, tmp_path):
    policy = make_policy()
    start = checksum(policy.model)
    record = fit(policy, micro_batches(policy, 1))
    record.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved[REFERENCE_KEY]["sha256"] == start and "reference" not in " ".join(saved["state_dict"])
    other = make_policy(seed=1)
    with pytest.raises(CheckpointError, match=f"reference policy is {start[:12]}.*resume=never"):
        fit(other, micro_batches(other, 1), ckpt_path=tmp_path / "a.ckpt")
    same = make_policy()
    fit(same, micro_batches(same, 1), ckpt_path=tmp_path / "a.ckpt")
    with same.reference.model() as reference:
        assert checksum(reference) == start != checksum(same.model) == checksum(policy.model)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_policy, micro_batches, fit, wrong):
    policy = make_policy()
    batches = micro_batches(policy, 2)
    batches[wrong].advantages_BT[-1] = float("nan")
    before = [p.clone() for p in policy.model.parameters()]
    with pytest.raises(NonFiniteError, match="loss is nan at step 0"):
        fit(policy, batches, accumulate=2)
    assert all(torch.equal(p, b) for p, b in zip(policy.model.parameters(), before, strict=True))


def test_a_micro_batch_without_a_counted_token_is_harmless(make_policy, micro_batches, fit):
    policy = make_policy()
    batches = micro_batches(policy, 2)
    for batch in batches:
        batch.mask_BT.zero_()
    record = fit(policy, batches, accumulate=2)
    assert all(not g.any() for g in record.steps[0].values()) and record.metrics[0]["loss"] == 0


def test_router_biases_move_once_per_optimizer_step_on_the_whole_steps_load(make_policy, micro_batches, fit):
    whole = make_policy(router_bias_rate=0.01)
    cut = make_policy(router_bias_rate=0.01)
    one = fit(whole, micro_batches(whole, 1)).bias[0]
    four = fit(cut, micro_batches(cut, 4), accumulate=4).bias[0]
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a, b) and a.abs().max() == pytest.approx(0.01)
    assert not any(r.load_E.any() for r in cut.model.routers())
    frozen = make_policy()
    assert not fit(frozen, micro_batches(frozen, 1)).bias[0][0].any()
    assert not any(r.load_E.any() for r in frozen.model.routers())


def test_forwards_without_gradient_leave_the_expert_load(make_policy, round_batch, fit, micro_batches):
    policy = make_policy()
    fit(policy, micro_batches(policy, 1))
    policy.train()
    got = policy.old_logprobs(round_batch), policy.ref_logprobs(round_batch)
    assert not any(r.load_E.any() for r in policy.model.routers()) and not got[0].requires_grad
    assert (got[0] - got[1]).abs().max() > 1e-4


def test_accumulation_other_than_the_loops_is_refused(make_policy, fit):
    def never(*args):
        raise AssertionError("no rollout may start")

    loop = RolloutLoop(
        PromptCursor([Prompt("a", "", "", "", (1,))]),
        Stages(push=never, generate=never, score=never, assess=never),
        RoundShape(rounds=1, prompts_per_round=2, group_size=2, micro_batches=2),
        request_seed=never,
        seed=0,
        max_completion=1,
    )
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=4 .* 2 micro-batches"):
        fit(make_policy(), loop, accumulate=4)


def test_sampling_at_another_temperature_than_the_log_probs_is_refused(make_policy):
    policy = make_policy(temperature=0.7)
    with pytest.raises(ConfigError, match=r"sampling.temperature=0.9.*temperature=0.7"):
        policy.stages(BuiltinEngine(ByteTokenizer()), Sampling(temperature=0.9), lambda p, c: None)
