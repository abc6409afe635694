"""Groups come from roles: every parameter exactly once, with its multipliers."""

import pytest
import torch
from torch import nn

from lit_reason.errors import ConfigError
from lit_reason.models import Base, ModelConfig, Transformer, parameter_roles
from lit_reason.optim import AdamW, parameter_groups, schedule


@pytest.fixture
def model() -> Transformer:
    base = Base(width=16, depth=2)
    return Transformer(
        ModelConfig(width=32, depth=2, heads=2, kv_lora_rank=8, ffn_width=48, expert_width=16, experts=4, base=base)
    )


def test_every_parameter_is_in_exactly_one_group_with_its_role(model):
    groups = parameter_groups(model, lr=0.01, weight_decay=0.1, eps=1e-8)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    roles = parameter_roles(model)
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        group, role = group_of[id(p)], roles[name]
        assert group["lr"] == 0.01 * role.lr
        assert group["weight_decay"] == 0.1 * role.weight_decay
        assert group["eps"] == 1e-8 * role.eps
        assert group["name"].startswith(role.kind)
    assert len({group["name"] for group in groups}) == len(groups)


def test_frozen_parameters_have_no_group(model):
    model.embed.weight.requires_grad_(False)
    ids = {id(p) for group in parameter_groups(model, lr=1, weight_decay=0, eps=1) for p in group["params"]}
    assert ids == {id(p) for p in model.parameters()} - {id(model.embed.weight)}


def test_a_foreign_model_decays_its_matrices_only():
    foreign = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Embedding(5, 3))
    groups = {g["name"]: g for g in parameter_groups(foreign, lr=0.5, weight_decay=0.1, eps=1e-8)}
    assert [tuple(p.shape) for p in groups["matrix"]["params"]] == [(3, 4)]
    assert groups["matrix"]["weight_decay"] == 0.1 and groups["other"]["weight_decay"] == 0
    assert groups["matrix"]["lr"] == groups["other"]["lr"] == 0.5


def test_the_schedule_keeps_the_ratios_between_roles(model):
    optimizer, scheduler = AdamW(lr=0.01, schedule="cosine", warmup_steps=4, final_fraction=0.1).build(model, 20)
    base = [group["initial_lr"] for group in optimizer.param_groups]
    assert len(set(base)) > 1
    seen = []
    for _ in range(20):
        factors = [g["lr"] / b for g, b in zip(optimizer.param_groups, base, strict=True)]
        assert factors == pytest.approx([factors[0]] * len(factors))
        seen.append(factors[0])
        optimizer.step()
        scheduler.step()
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert seen[12] == pytest.approx(0.1 + 0.9 * 0.5)  # halfway between step 4 and step 20


@pytest.mark.parametrize(
    ("shape", "halfway", "end"), [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)]
)
def test_schedules_by_hand(shape, halfway, end):
    factor = schedule(shape, warmup_steps=10, total_steps=110, final_fraction=0.2)
    assert [factor(0), factor(9), factor(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert [factor(60), factor(110), factor(500)] == pytest.approx([halfway, end, end])


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps=100 .* 100: type optimizer.warmup_steps=10"):
        schedule("linear", warmup_steps=100, total_steps=100, final_fraction=0)
    schedule("linear", warmup_steps=99, total_steps=100, final_fraction=0)


def test_wrong_names_and_rates():
    with pytest.raises(ConfigError, match=r"optimizer.schedule='cosin': did you mean 'cosine'"):
        schedule("cosin", warmup_steps=0, total_steps=1, final_fraction=0)
    with pytest.raises(ConfigError, match=r"optimizer\.lr=0"):
        AdamW(lr=0)


def test_decay_acts_on_matrices_and_leaves_norms_and_embedding(model):
    optimizer, _ = AdamW(lr=0.01, weight_decay=0.5).build(model, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    # lr x decay is the same for every matrix: 0.01 / m * 0.5 m.
    for name, p in model.named_parameters():
        kept = parameter_roles(model)[name].kind in ("norm", "embedding")
        torch.testing.assert_close(p.detach(), before[name] * (1.0 if kept else 1 - 0.005))
