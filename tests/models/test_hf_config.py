"""config.json of DeepSeek checkpoints: published shapes, the way out and back, and what is refused."""

import json

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.models import Transformer, Yarn
from lit_reason.models.hf import load_hf, save_hf
from lit_reason.models.hf_config import from_hf_config, to_hf_config
from lit_reason.models.hf_slots import slots

PUBLISHED = {  # config.json as released, less what no shape depends on
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "moe_layer_freq": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "hidden_act": "silu",
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy", "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "max_position_embeddings": 163840, "aux_loss_alpha": 0.001, "seq_aux": True,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
PUBLISHED["Moonlight-16B-A3B"] = PUBLISHED["DeepSeek-V2-Lite"] | {
    "model_type": "deepseek_v3", "vocab_size": 163840, "intermediate_size": 11264, "rms_norm_eps": 1e-5,
    "norm_topk_prob": True, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "rope_theta": 50000.0, "rope_scaling": None, "max_position_embeddings": 8192, "num_nextn_predict_layers": 0,
}  # fmt: skip
PUBLISHED["DeepSeek-V2"] = PUBLISHED["DeepSeek-V2-Lite"] | {
    "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160,
    "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),  # the technical reports' 671B, 15.7B, 15.29B + embedding, 236B, to the last one
    [
        ("DeepSeek-V3", 671_026_404_352),
        ("DeepSeek-V2-Lite", 15_706_484_224),
        ("Moonlight-16B-A3B", 15_960_108_544),
        ("DeepSeek-V2", 235_741_434_880),
    ],
)
def test_published_configs_have_the_published_sizes(name, parameters):
    config = from_hf_config(PUBLISHED[name])
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    places, tensors = slots(config), model.state_dict()
    covered = sum(slot.view(tensors).numel() for key, slot in places.items() if not key.endswith("correction_bias"))
    assert covered == parameters
    assert config.residual_scale == 1 and config.latent_eps == 1e-6
    again = to_hf_config(config, "bfloat16")
    ignored = ("quantization_config", "num_nextn_predict_layers", "rope_scaling")
    assert {k: again[k] for k in PUBLISHED[name] if k not in ignored} == {
        k: v for k, v in PUBLISHED[name].items() if k not in ignored
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": 9, "expert_groups": 4, "groups_per_token": 2, "routed_scale": 2.5, "shared_experts": 2},
        {"scoring": "softmax", "norm_topk_prob": False, "shared_experts": 0},
        {
            "scoring": "softmax",
            "norm_topk_prob": False,
            "expert_groups": 8,
            "groups_per_token": 3,
            "group_score": "max",
            "routed_scale": 16.0,
        },
        {"norm_eps": 1e-5, "latent_norm_eps": 1e-6, "rope_theta": 5e4},
        {"yarn": Yarn(factor=4.0, original_max_seq_len=24, mscale=0.7, mscale_all_dim=0.8)},
        {"yarn": Yarn(factor=4.0, original_max_seq_len=24, mscale=1.0, mscale_all_dim=0.0), "norm_topk_prob": False},
        {"first_dense": 2, "expert_width": 96},  # dense: what experts would be is not read, so it is the default
    ],
)
def test_the_config_comes_back(tiny, changes):
    config = tiny(**changes)
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config, "float32")))) == config


def test_the_config_says_what_engines_ask_for(tiny, tmp_path):
    folder = save_hf(Transformer(tiny()), tmp_path / "out", special_tokens={"eos_token_id": 3})
    values = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "rms_norm_eps": 1e-6,
        "moe_router_dtype": "float32",
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
        "bos_token_id": None,
        "torch_dtype": "float32",
    }
    assert {key: values[key] for key in expected} == expected
    v2 = to_hf_config(tiny(scoring="softmax", norm_topk_prob=False), "bfloat16")
    assert (v2["model_type"], v2["topk_method"], v2["scoring_func"]) == ("deepseek_v2", "greedy", "softmax")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "deepseek_v4"}, ["model_type='deepseek_v4'", "'deepseek_v3'"]),
        ({"model_type": "llama"}, ["model_type='llama'", "deepseek_v2, deepseek_v3"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias=True", "valid: False"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True", "valid: False"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq=2", "valid: 1"]),
        ({"num_key_value_heads": 1}, ["num_key_value_heads=1", "valid: 2"]),
        ({"scoring_func": "softmax"}, ["scoring_func='softmax'", "'sigmoid'"]),
        ({"topk_method": "greedy"}, ["topk_method='greedy'", "'noaux_tc'"]),
        ({"model_type": "deepseek_v2"}, ["topk_method='noaux_tc'", "'greedy', 'group_limited_greedy'"]),
        ({"hidden_size": "32"}, ["hidden_size='32'", "an integer"]),
        ({"rms_norm_eps": True}, ["rms_norm_eps=True", "a number"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_type='linear'", "'default', 'yarn'"]),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 9, "mscale": 0.7}},
            ["mscale=0.7, mscale_all_dim=0.0", "mscale=1 with mscale_all_dim=0"],
        ),
        ({"rope_interleave": "no"}, ["rope_interleave='no'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quant_method='gptq'", "'fp8'"]),
        ({"num_hidden_layers": 4}, ["mup.residual_scale=1.0", "0.5"]),
        ({"mup": {"base": {}}}, ["mup=", "residual_scale"]),
        ({"num_experts_per_tok": 9}, ["experts_per_token=9", "1..8"]),
        ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
    ],
)
def test_a_config_that_cannot_be_expressed_says_why(tiny, edit, tmp_path, changes, parts):
    folder = save_hf(Transformer(tiny()), tmp_path / "out")
    edit(folder, **changes)
    with pytest.raises(ConfigError) as caught:
        load_hf(folder)
    for part in parts:
        assert part in str(caught.value)


def test_v2_with_normalised_weights_or_rotary_halves_is_refused(tiny):
    values = to_hf_config(tiny(scoring="softmax", norm_topk_prob=False), "float32")
    with pytest.raises(ConfigError, match="programs disagree"):
        from_hf_config(values | {"norm_topk_prob": True})
    with pytest.raises(ConfigError, match="rope_interleave=False"):
        from_hf_config(values | {"rope_interleave": False})


def test_a_missing_key_is_named(tiny):
    for key in ("hidden_size", "q_lora_rank", "routed_scaling_factor"):
        values = to_hf_config(tiny(), "float32")
        del values[key]
        with pytest.raises(ConfigError, match=f"lacks '{key}'"):
            from_hf_config(values)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"norm_eps": 1e-5}, "model.latent_norm_eps"),
        ({"scoring": "softmax"}, "model.norm_topk_prob"),
        ({"scoring": "softmax", "norm_topk_prob": False, "expert_groups": 2}, "model.group_score=top2"),
        ({"expert_groups": 2, "group_score": "max"}, "model.group_score=max"),
        ({"yarn": Yarn(mscale=0.7, mscale_all_dim=0.0)}, "mscale=0.7"),
        ({"scoring": "softmax", "norm_topk_prob": False, "heads": 3}, "model.heads=3"),
        ({"experts": 1, "experts_per_token": 1}, "model.experts=1"),
    ],
)
def test_a_model_that_their_format_cannot_express_is_not_written(tiny, tmp_path, changes, part):
    with pytest.raises(ConfigError, match=part):
        save_hf(Transformer(tiny(**changes)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_has_no_key_for_comes_back_and_older_exports_lack_some(tiny, edit, tmp_path):
    config = tiny(branch_gain=0.5, mtp_loss=0.1, centre_bias=True)
    folder = save_hf(Transformer(config), tmp_path / "out")
    assert from_hf_config(json.loads((folder / "config.json").read_text())) == config
    block = json.loads((folder / "config.json").read_text())["mup"]
    edit(folder, mup={key: block[key] for key in ("base", "init_gain", "embed_std", "residual_scale")})
    assert from_hf_config(json.loads((folder / "config.json").read_text())) == tiny()
    edit(folder, mup=block | {"centre_bias": "yes"})
    with pytest.raises(ConfigError, match=r"mup.centre_bias='yes': must be true or false"):
        load_hf(folder)
