"""The critic: where its values come from, what its gradient reaches, what it costs, and that it learns."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_reason.errors import ConfigError
from lit_reason.models import HFModel
from lit_reason.models.lora import LoRA
from lit_reason.modules import PolicyModule
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW, Muon

AXES = {
    "advantage": {"name": "gae", "gamma": 1.0, "lam": 0.95, "holes": "skip", "whiten_eps": 1e-8},
    "ratio": "token",
    "clip": "none",
    "aggregation": "token_mean",
}
CRITIC = {"trunk": "separate", "lr_factor": 10.0, "loss_coef": 0.5, "clip": 0.2}


@pytest.fixture
def make_ppo(make_model):
    def make(optimizer=None, **changes):
        return PolicyModule(make_model(), optimizer or AdamW(lr=0.01), Objective(**AXES, critic=CRITIC | changes))

    return make


def values_by_hand(policy, batch):
    """Of the plain padded forward of the trunk, before each target."""
    trunk = policy.critic.trunk if policy.critic.trunk is not None else policy.model
    return (trunk.hidden(batch.input_ids_BT).states_BTD @ policy.critic.head.weight[0]) * (batch.mask_BT > 0)


@pytest.mark.parametrize("trunk", ["separate", "shared"])
@torch.no_grad()
def test_values_are_those_of_the_state_before_each_token(make_ppo, round_batch, trunk):
    policy = make_ppo(trunk=trunk)
    assert not policy.forward(round_batch).values_BT.any(), "the head starts at 0"
    torch.nn.init.normal_(policy.critic.head.weight)
    torch.testing.assert_close(
        policy.forward(round_batch).values_BT, values_by_hand(policy, round_batch), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_the_value_loss_reaches_the_policy_only_through_a_shared_trunk(make_ppo, round_batch, trunk):
    policy = make_ppo(trunk=trunk)
    torch.nn.init.normal_(policy.critic.head.weight)
    policy.forward(round_batch).values_BT.sum().backward()
    reached = any(p.grad is not None and p.grad.any() for p in policy.model.blocks.parameters())
    assert reached == (trunk == "shared")
    assert policy.critic.head.weight.grad.any()


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_the_critics_own_rate(make_ppo, optimizer):
    """Each group of the critic has ten times the rate of the policy's group of the same kind."""
    policy = make_ppo(optimizer(lr=0.01))
    built, _ = optimizer(lr=0.01).build(policy.trained(), total_steps=1)
    rate = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    trunk = dict(policy.critic.trunk.named_parameters())
    for name, p in policy.model.named_parameters():
        if name == "head.weight":
            assert id(trunk[name]) not in rate, "the critic's copy of the head says tokens: not trained"
        else:
            assert rate[id(trunk[name])] == pytest.approx(10 * rate[id(p)]), name
    assert rate[id(policy.critic.head.weight)] == pytest.approx(10 * rate[id(policy.model.norm.weight)])


def test_it_learns_the_returns(make_ppo, micro_batches, fit):
    """Returns that depend on the prompt: after 60 updates most of their variance is explained."""
    policy = make_ppo(clip=None, lr_factor=2.0)
    batches = micro_batches(policy, 1) * 60
    batches[0].advantages_BT.zero_()
    batches[0].returns_BT = batches[0].input_ids_BT[:, :1].float().expand_as(batches[0].mask_BT) - 2.5
    batches[0].values_BT = torch.zeros_like(batches[0].mask_BT)
    metrics = fit(policy, batches).metrics
    assert metrics[0]["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1]["critic/explained_variance"] > 0.9
    assert metrics[-1]["critic/loss"] < 0.1 * metrics[0]["critic/loss"]


def test_the_checkpoint_holds_the_critic(make_ppo, micro_batches, fit, tmp_path):
    policy = make_ppo()
    fit(policy, micro_batches(policy, 1)).trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["critic.head.weight"], policy.critic.head.weight) and saved["critic.head.weight"].any()
    assert "critic.trunk.blocks.0.attn.kv_a.weight" in saved


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_a_model_of_transformers_has_a_critic_too(round_batch, tied, trunk):
    lm = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=48, tie_word_embeddings=tied)
    )  # fmt: skip
    policy = PolicyModule(HFModel(lm), AdamW(), Objective(**AXES, critic=CRITIC | {"trunk": trunk}))
    torch.nn.init.normal_(policy.critic.head.weight)
    policy.forward(round_batch).values_BT.sum().backward()
    if trunk == "separate":
        embedding = policy.critic.trunk.lm.get_input_embeddings().weight
        assert embedding.requires_grad and embedding.grad.any()
        assert policy.critic.trunk.lm.get_output_embeddings().weight.requires_grad == tied
    with torch.no_grad():
        torch.testing.assert_close(
            policy.critic(round_batch.input_ids_BT, round_batch.mask_BT > 0,
                          policy.model.states_at(round_batch.input_ids_BT, round_batch.mask_BT > 0)),
            policy.forward(round_batch).values_BT[round_batch.mask_BT > 0],
        )  # fmt: skip


def test_refusals(make_model):
    with pytest.raises(ConfigError, match="critic: got none with advantage 'gae'"):
        Objective(**AXES)
    with pytest.raises(ConfigError, match="critic: got one with advantage 'group_mean'"):
        Objective(**AXES | {"advantage": "group_mean"}, critic=CRITIC)
    with pytest.raises(ConfigError, match=r"critic.trunk: got 'both'.*'separate' or 'shared'"):
        Objective(**AXES, critic=CRITIC | {"trunk": "both"})
    with pytest.raises(ConfigError, match="critic: 'clip' is missing"):
        Objective(**AXES, critic={k: v for k, v in CRITIC.items() if k != "clip"})
    with pytest.raises(ConfigError, match=r"critic: got key 'lr'"):
        Objective(**AXES, critic=CRITIC | {"lr": 1.0})
    model = make_model()
    LoRA(rank=4).apply(model)
    with pytest.raises(ConfigError, match=r"critic.trunk=separate.*Type algorithm.critic.trunk=shared"):
        PolicyModule(model, AdamW(), Objective(**AXES, critic=CRITIC))
    PolicyModule(model, AdamW(), Objective(**AXES, critic=CRITIC | {"trunk": "shared"}))
