"""What the policy is held to: frozen, moving, its own base under adapters, a teacher."""

import pytest
import torch

from lit_reason.errors import CheckpointError, ConfigError
from lit_reason.models.adapters import adapters
from lit_reason.models.checksum import checksum
from lit_reason.models.lora import LoRA
from lit_reason.modules import EMA, Frozen, PolicyModule, Refreshed, Teacher, token_logprobs
from lit_reason.modules.policy import REFERENCE_KEY
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_ema_follows_every_step(make_policy, micro_batches, fit):
    """own = 0.75 own + 0.25 policy after the one step."""
    policy = make_policy(lr=0.05, reference=EMA(0.75))
    start = weights(policy.model)
    fit(policy, micro_batches(policy, 2), accumulate=2)
    end = weights(policy.model)
    with policy.reference.model() as model:
        for name, own in model.named_parameters():
            torch.testing.assert_close(own, 0.75 * start[name] + 0.25 * end[name], atol=1e-7, rtol=1e-5)
        assert any(not torch.equal(own, start[name]) for name, own in model.named_parameters())


def test_ema_of_bfloat16_weights_moves(make_model):
    """1000 steps of a hundredth of 0.1: in bfloat16 every one of them would be rounded away."""
    model = make_model().to(torch.bfloat16)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        reference = EMA(0.99)
        reference.bind(model)
        model.norm.weight.fill_(1.125)
    for _ in range(1000):
        reference.after_step(model)
    with reference.model() as own:
        torch.testing.assert_close(own.norm.weight, torch.full_like(own.norm.weight, 1.125), atol=1e-4, rtol=0)


def test_refreshed_follows_every_other_round(make_policy):
    policy = make_policy(reference=Refreshed(every=2))
    seen = []
    for index in range(4):
        with torch.no_grad():
            for p in policy.model.parameters():
                p.add_(1.0)
        policy.reference.before_round(policy.model, index)
        with policy.reference.model() as model:
            seen.append(round((policy.model.norm.weight[0] - model.norm.weight[0]).item()))
    assert seen == [0, 1, 0, 1]


@pytest.mark.parametrize("make", [lambda: EMA(0.5), lambda: Refreshed(1)])
def test_a_moving_reference_is_in_the_checkpoint(make_policy, micro_batches, fit, tmp_path, make):
    policy = make_policy(lr=0.05, reference=make())
    record = fit(policy, micro_batches(policy, 1))
    policy.reference.before_round(policy.model, 0)
    record.trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = make_policy(lr=0.05, seed=3, reference=make())
    fit(again, micro_batches(again, 1), ckpt_path=tmp_path / "a.ckpt")
    with policy.reference.model() as mine, again.reference.model() as other:
        assert checksum(mine) == checksum(other) != checksum(make_policy(seed=3).model)
    another = make_policy(reference=EMA(0.9))
    with pytest.raises(CheckpointError, match=r"the checkpoint's reference is .* this run's is .*decay 0.9"):
        fit(another, micro_batches(another, 1), ckpt_path=tmp_path / "a.ckpt")


def test_under_adapters_the_base_is_the_reference_without_a_copy(make_model, micro_batches, fit):
    model = make_model()
    plain = make_model()
    LoRA(rank=4).apply(model)
    axes = {"advantage": "group_mean", "ratio": "token", "clip": "none", "aggregation": "token_mean"}
    policy = PolicyModule(model, AdamW(lr=0.05), Objective(**axes, kl={"name": "k2_loss", "weight": 0.1}))
    assert adapters(policy.model) and not hasattr(policy.reference, "_model")
    batches = micro_batches(policy, 2)
    fit(policy, batches, accumulate=2)
    with torch.no_grad(), policy.reference.model() as reference:
        assert reference is policy.model and not reference.training
        off = token_logprobs(reference, batches[0], 1.0)[0]
    assert policy.model.training
    with torch.no_grad():
        torch.testing.assert_close(off, token_logprobs(plain, batches[0], 1.0)[0], atol=1e-6, rtol=0)
        assert (token_logprobs(policy.model, batches[0], 1.0)[0] - off).abs().max() > 1e-3


def test_a_resumed_policy_with_adapters_knows_its_base(make_model, micro_batches, fit, tmp_path):
    axes = {"advantage": "group_mean", "ratio": "token", "clip": "none", "aggregation": "token_mean"}

    def make(seed):
        model = make_model(seed)
        LoRA(rank=4).apply(model)
        return PolicyModule(model, AdamW(lr=0.05), Objective(**axes))

    policy = make(0)
    fit(policy, micro_batches(policy, 1)).trainer.save_checkpoint(tmp_path / "a.ckpt")
    same = make(0)
    fit(same, micro_batches(same, 1), ckpt_path=tmp_path / "a.ckpt")
    assert checksum(same.model) == checksum(policy.model)
    other = make(1)
    with pytest.raises(CheckpointError, match="reference policy is"):
        fit(other, micro_batches(other, 1), ckpt_path=tmp_path / "a.ckpt")


def test_adapters_and_balancing_are_refused(make_model):
    """The biases belong to the base, which is the reference."""
    model = make_model()
    LoRA(rank=4).apply(model)
    axes = {"advantage": "group_mean", "ratio": "token", "clip": "none", "aggregation": "token_mean"}
    with pytest.raises(ConfigError, match=r"router_bias_rate=0.01 with adapters.*Type rl.router_bias_rate=0"):
        PolicyModule(model, AdamW(), Objective(**axes), router_bias_rate=0.01)


def test_a_copy_of_adapters_is_refused(make_model):
    model = make_model()
    LoRA(rank=4).apply(model)
    with pytest.raises(ConfigError, match=r"reference=ema.*Type reference=frozen, or adapter=none"):
        EMA(0.9).bind(model)


def test_a_teacher_is_another_model_and_known_by_its_checksum(make_policy, make_model, micro_batches, fit, tmp_path):
    policy = make_policy("opd")
    with policy.reference.model() as teacher:
        assert checksum(teacher) == checksum(make_model(7)) != checksum(policy.model)
    record = fit(policy, micro_batches(policy, 1))
    record.trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)[REFERENCE_KEY]["rule"] == "a teacher"
    frozen = make_policy("grpo")
    with pytest.raises(CheckpointError, match="reference is 'a teacher'"):
        fit(frozen, micro_batches(frozen, 1), ckpt_path=tmp_path / "a.ckpt")


def test_a_teacher_with_another_vocabulary_is_refused(make_model):
    teacher = Teacher("wide")
    teacher.load(lambda name: make_model(vocab_size=48))
    with pytest.raises(ConfigError, match=r"reference.name=wide: the teacher has 48 token ids, the policy 40"):
        teacher.bind(make_model())


def test_distillation_without_a_teacher_is_refused(make_model):
    for name in ("distill", "jsd"):
        axes = {"ratio": "token", "clip": "none", "aggregation": "token_mean"}
        objective = (
            Objective({"name": "distill", "discount": 0.0}, **axes, kl={"name": "k1_token_reward", "weight": 1.0})
            if name == "distill"
            else Objective("none", **axes, distillation={"beta": 0.5, "weight": 1.0})
        )
        with pytest.raises(ConfigError, match=r"reference=frozen.*Type reference=teacher reference.name=NAME"):
            PolicyModule(make_model(), AdamW(), objective, reference=Frozen())


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: EMA(1.0), "reference.decay=1.0"), (lambda: Refreshed(0), "reference.every=0: rounds")],
)
def test_wrong_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
