"""The shape's checks and its JSON round trip."""

import json

import pytest

from lit_reason.errors import ConfigError
from lit_reason.models import Base, ModelConfig, Transformer, Yarn
from lit_reason.models.layers import RMSNorm


def test_json_round_trip_keeps_every_value():
    config = ModelConfig(
        width=96, depth=3, q_lora_rank=24, experts=6, expert_groups=3, groups_per_token=2, routed_scale=2.5,
        yarn=Yarn(factor=8.0, mscale_all_dim=0.707), base=Base(width=32, depth=2, heads=1, expert_width=16),
    )  # fmt: skip
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.yarn, Yarn) and again.base.expert_width == 16
    assert ModelConfig.from_dict(json.loads(json.dumps(ModelConfig().to_dict()))) == ModelConfig()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"width": 0}, ["model.width=0", "at least 1"]),
        ({"qk_rope_head_dim": 5}, ["model.qk_rope_head_dim=5", "even"]),
        ({"first_dense": 5}, ["model.first_dense=5", "0..depth=4"]),
        ({"experts": 9, "expert_groups": 2}, ["model.experts=9", "model.expert_groups=2"]),
        ({"groups_per_token": 2}, ["model.groups_per_token=2", "1..expert_groups=1"]),
        ({"expert_groups": 8, "groups_per_token": 4}, ["1 expert a group", "type model.expert_groups=4"]),
        # 8 experts in 4 groups of 2, one group kept: 2 experts are in reach.
        ({"expert_groups": 4, "experts_per_token": 3}, ["model.experts_per_token=3", "1..2"]),
        ({"experts_per_token": 0}, ["model.experts_per_token=0", "1..8"]),
        ({"shared_experts": -1}, ["model.shared_experts=-1", "at least 0"]),
        ({"expert_groups": 0}, ["model.expert_groups=0", "at least 1"]),
        ({"scoring": "sigmod"}, ["model.scoring='sigmod'", "'sigmoid'", "softmax"]),
        ({"group_score": "top1"}, ["model.group_score='top1'", "'top2'"]),
        ({"q_lora_rank": 0}, ["model.q_lora_rank=0", "at least 1"]),
        ({"expert_width": 0}, ["model.expert_width=0", "at least 1"]),
        ({"base": Base(width=0)}, ["model.base.width=0", "at least 1"]),
    ],
)
def test_a_wrong_value_says_what_is_valid(changes, parts):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_a_group_of_one_expert_is_enough_for_its_best():
    assert ModelConfig(expert_groups=8, groups_per_token=4, group_score="max").expert_groups == 8


def test_the_latents_norms_have_their_own_eps_if_one_is_given():
    assert ModelConfig(norm_eps=1e-5).latent_eps == 1e-5
    model = Transformer(ModelConfig(depth=1, norm_eps=1e-5, latent_norm_eps=1e-6, q_lora_rank=8))
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    assert {name for name, value in eps.items() if value == 1e-6} == {"blocks.0.attn.q.1", "blocks.0.attn.kv_norm"}
    assert set(eps.values()) == {1e-5, 1e-6}


def test_routing_is_not_checked_in_a_model_without_experts():
    assert ModelConfig(depth=2, first_dense=2, experts_per_token=99).moe_layers == 0


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"widht": 64}, ["model.widht", "'width'"]),
        ({"yarn": {"facto": 2.0}}, ["model.yarn.facto", "'factor'"]),
        ({"base": {"expert_with": 2}}, ["model.base.expert_with", "'expert_width'"]),
    ],
)
def test_an_unknown_key_names_the_nearest(values, parts):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values)
    for part in parts:
        assert part in str(caught.value)


def test_base_config_changes_only_what_the_base_names():
    config = ModelConfig(width=256, heads=8, ffn_width=768, base=Base(width=64, ffn_width=192))
    base = config.base_config()
    assert (base.width, base.ffn_width, base.heads, base.depth) == (64, 192, 8, config.depth)
    assert ModelConfig(depth=8, base=Base(depth=2)).residual_scale == 0.25
