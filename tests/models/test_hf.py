"""DeepSeek checkpoint folders: parity with transformers, muP's way out and back, FP8, shards, and what is refused."""

import importlib.util
import json
import math
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_reason.errors import ConfigError, DataError
from lit_reason.models import Base, Transformer, Yarn, hf
from lit_reason.models.hf import dequantise, fold, from_hf_config, load_hf, save_hf, slots, to_hf_config, unfold

SCRIPT = Path(__file__).parents[2] / "scripts" / "hf_parity.py"


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("hf_parity", SCRIPT)
    module = sys.modules["hf_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.transformers.logging.set_verbosity_error()
    module.transformers.logging.disable_progress_bar()
    return module


def test_every_config_has_their_logits_and_tokens(parity):
    assert len(parity.CASES) == 12
    for name, values in parity.CASES.items():
        found = parity.compare(values, seed=1, tokens=32, new_tokens=6)
        assert found.ok and found.tokens == 12, (name, found)


def test_yarn_without_its_mscale_fields_means_what_transformers_does(parity):
    bare = {key: value for key, value in parity.YARN.items() if "mscale" not in key}
    values = parity.V3 | {"rope_parameters": bare}
    assert parity.compare(values, tokens=24, new_tokens=2).ok
    config = from_hf_config(values | {"rms_norm_eps": 1e-6})
    assert config.yarn is not None and (config.yarn.mscale, config.yarn.mscale_all_dim) == (1.0, 0.0)


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


def randomised(config, dtype=torch.float32) -> Transformer:
    torch.manual_seed(5)
    model = Transformer(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        for router in model.routers():
            router.bias_E.normal_(std=0.2)
    return model


def same(a: Transformer, b: Transformer) -> bool:
    """Equal configs, equal bits."""
    left, right = a.state_dict(), b.state_dict()
    return a.config == b.config and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- out and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("depth", "base_depth", "rounds"), [(4, 1, False), (3, 2, True), (2, 7, True), (2, 2, False)]
)  # 1/4, 2/3, 7/2, 1
def test_the_round_trip_is_exact_whatever_the_residual_multiplier(tiny, tmp_path, dtype, depth, base_depth, rounds):
    base = Base(width=16, depth=base_depth, heads=1, expert_width=8)
    model = randomised(tiny(depth=depth, base=base, init_gain=0.7, embed_std=0.3, balance_loss=2e-4), dtype)
    save_hf(model, tmp_path / "out")
    assert (tmp_path / "out" / hf.ROUNDING).exists() == rounds
    assert same(load_hf(tmp_path / "out"), model)
    assert load_hf(tmp_path / "out", torch.float32).embed.weight.dtype == torch.float32


def test_what_is_folded_where(tiny, tmp_path):
    model = randomised(tiny(depth=2, base=Base(width=16, depth=1)))
    weights = load_file(save_hf(model, tmp_path / "out") / "model.safetensors")
    ours = model.state_dict()
    halved = [name for name, slot in slots(model.config).items() if torch.equal(weights[name] * 2, slot.view(ours))]
    assert sorted(halved) == sorted(n for n in weights if n.endswith(("o_proj.weight", "down_proj.weight")))
    kept = [name for name, slot in slots(model.config).items() if torch.equal(weights[name], slot.view(ours))]
    assert len(kept) + len(halved) == len(weights)


def test_folding_is_correctly_rounded_and_undone_bit_for_bit():
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    weight = bits.to(torch.int32).view(torch.float32)
    weight = weight[weight.isfinite()]  # every exponent, subnormal ones too
    for scale in (0.5, 1 / 3, 2 / 3, 7.0, 0.01):
        folded, rounding = fold(weight, scale)
        assert torch.equal(folded, (weight.double() * scale).float())
        assert torch.equal(unfold(folded, scale, rounding).view(torch.int32), weight.view(torch.int32))
        usual = (weight.abs() > 1e-30) & folded.isfinite()
        assert rounding[usual].abs().max() == (0 if scale == 0.5 else 1)  # units in the last place


def test_another_programs_copy_unfolds_within_one_unit(tiny, tmp_path):
    model = randomised(tiny(depth=3, base=Base(width=16, depth=2)))
    folder = save_hf(model, tmp_path / "out")
    (folder / hf.ROUNDING).unlink()
    ours, again = model.state_dict(), load_hf(folder).state_dict()
    for name in ours:
        torch.testing.assert_close(again[name], ours[name], rtol=2**-23, atol=0)


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


def test_every_parameter_has_exactly_one_place(tiny):
    for changes in (
        {},
        {"q_lora_rank": 9, "shared_experts": 2},
        {"shared_experts": 0, "first_dense": 0, "mtp_depth": 1},
    ):
        model = Transformer(tiny(**changes))
        seen = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        for name, slot in slots(model.config).items():
            if not name.endswith(("layers.2.embed_tokens.weight", "shared_head.head.weight")):  # repeated
                slot.view(seen).add_(1)
        assert all((count == (0 if name.endswith("load_E") else 1)).all() for name, count in seen.items())


def test_a_bfloat16_models_routers_stay_float32_on_disk_and_back(tiny, tmp_path):
    model = randomised(tiny(), torch.bfloat16)
    weights = load_file(save_hf(model, tmp_path / "out") / "model.safetensors")
    assert {t.dtype for n, t in weights.items() if ".gate." in n} == {torch.float32}
    assert {t.dtype for n, t in weights.items() if ".gate." not in n} == {torch.bfloat16}
    again = load_hf(tmp_path / "out", torch.bfloat16)
    assert again.routers()[0].weight.dtype == torch.float32 and again.embed.weight.dtype == torch.bfloat16


# --- shards


def test_shards_hold_at_most_what_was_asked_for(tiny, tmp_path):
    model = randomised(tiny())
    folder = save_hf(model, tmp_path / "out", max_shard_bytes=16_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.name.endswith(f"-of-{len(files):05}.safetensors") for f in files)
    sizes = [sum(t.numel() * t.element_size() for t in load_file(f).values()) for f in files]
    assert max(sizes) <= 16_000 and sum(sizes) == index["metadata"]["total_size"]
    assert same(load_hf(folder), model)


def test_one_source_tensor_is_in_memory_at_a_time(tiny, tmp_path, monkeypatch):
    folder = save_hf(randomised(tiny()), tmp_path / "out", max_shard_bytes=16_000)
    alive, most = weakref.WeakSet(), []
    read = hf._Shards.read

    def counted(self, name):
        tensor = read(self, name)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(hf._Shards, "read", counted)
    model = load_hf(folder)
    assert len(most) == len(slots(model.config)) and max(most) == 1


def test_a_failed_save_leaves_nothing_and_a_full_folder_is_left_alone(tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(hf, "save_file", full)
        save_hf(Transformer(tiny()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    save_hf(Transformer(tiny()), tmp_path / "out")  # an empty one is taken
    with pytest.raises(ConfigError, match="not empty"):
        save_hf(Transformer(tiny()), tmp_path / "out")
    with pytest.raises(ConfigError, match="max_shard_bytes=0"):
        save_hf(Transformer(tiny()), tmp_path / "new", max_shard_bytes=0)


# --- FP8, multi-token prediction, rotary tables


def test_blocks_have_their_own_scale_up_to_ragged_edges():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, generator=generator)
    got = dequantise(weight, scale, (2, 3))
    for i in range(5):
        for j in range(7):
            assert got[i, j] == weight[i, j].float() * scale[i // 2, j // 3]
    with pytest.raises(DataError, match=r"\(3, 2\).*\(5, 7\) needs \(3, 3\)"):
        dequantise(weight, scale[:, :2], (2, 3))


def quantise(weight, block):
    """FP8 blocks as DeepSeek-V3 stores them: amax of a block becomes 448."""
    rows, columns = (math.ceil(n / block) for n in weight.shape)
    scale = torch.ones(rows, columns)
    out = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[part].abs().max() / 448
            out[part] = weight[part] / scale[i, j]
    return out.to(torch.float8_e4m3fn), scale


def test_an_fp8_checkpoint_is_dequantised_into_bfloat16(tiny, tmp_path):
    model = randomised(tiny(ffn_width=130, width=136, base=Base(width=136, depth=2)))  # 128x128 blocks with edges
    folder = save_hf(model, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    quantised, expected = {}, {}
    for name, weight in weights.items():
        expected[name] = weight
        if weight.dim() == 2 and "proj" in name:
            quantised[name], quantised[f"{name}_scale_inv"] = quantise(weight, 128)
            full = quantised[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            expected[name] = quantised[name].float() * full[: weight.shape[0], : weight.shape[1]]
        else:
            quantised[name] = weight
    # The scales lie in another file than their weights.
    scales = {name: quantised.pop(name) for name in list(quantised) if name.endswith("_scale_inv")}
    assert len(scales) > 20
    (folder / "model.safetensors").unlink()
    save_file(quantised, folder / "a.safetensors")
    save_file(scales, folder / "b.safetensors")
    names = dict.fromkeys(quantised, "a.safetensors") | dict.fromkeys(scales, "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    edit(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]})
    loaded = load_hf(folder, torch.float32)
    for name, slot in slots(model.config).items():
        assert torch.equal(slot.view(loaded.state_dict()), expected[name]), name
    again = load_hf(folder)
    assert again.head.weight.dtype == torch.bfloat16
    assert torch.equal(again.blocks[0].attn.kv_a.weight, loaded.blocks[0].attn.kv_a.weight.bfloat16())
    del names["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(DataError, match=r"experts\.3\.up_proj.*has no .*scale_inv"):
        load_hf(folder)


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("first_dense", [0, 1])
def test_multi_token_prediction_layers_follow_the_trunks(tiny, tmp_path, first_dense):
    """They come back bit for bit, are not scaled by the trunk's 1/m_L, and repeat embedding and head."""
    model = randomised(tiny(mtp_depth=2, depth=4, first_dense=first_dense, base=Base(width=32, depth=3)))
    folder = save_hf(model, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    module = model.mtp[1]
    for name, ours in {
        "eh_proj": module.eh_proj,
        "enorm": module.enorm,
        "hnorm": module.hnorm,
        "self_attn.o_proj": module.block.attn.out,
        "shared_head.norm": module.norm,
        "shared_head.head": model.head,
        "embed_tokens": model.embed,
    }.items():
        assert torch.equal(weights[f"model.layers.5.{name}.weight"], ours.weight), name
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 2
    assert same(load_hf(folder), model)


def test_a_prediction_layers_own_embedding_or_head_is_refused_and_need_not_be_there(tiny, tmp_path):
    model = randomised(tiny(mtp_depth=1))
    names = [f"model.layers.2.{name}.weight" for name in ("embed_tokens", "shared_head.head")]
    for i, name in enumerate(names):
        folder = save_hf(model, tmp_path / f"own{i}")
        rewrite(folder, lambda weights, name=name: weights[name].add_(1))
        with pytest.raises(DataError, match=f"{name} differs from the trunk's own"):
            load_hf(folder)
    folder = save_hf(model, tmp_path / "bare")
    rewrite(folder, lambda weights: [weights.pop(name) for name in names])
    assert same(load_hf(folder), model)


def test_rotary_tables_are_left_out_and_a_promised_layer_may_be_missing(tiny, tmp_path):
    model = randomised(tiny())
    folder = save_hf(model, tmp_path / "out")
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    edit(folder, num_nextn_predict_layers=1)  # what transformers writes, layer or not
    assert same(load_hf(folder), model)


# --- what is refused


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
def test_a_config_that_cannot_be_expressed_says_why(tiny, tmp_path, changes, parts):
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


def test_selection_biases_have_no_place_in_v2(tiny, tmp_path):
    with pytest.raises(ConfigError, match="selection biases"):
        save_hf(randomised(tiny(scoring="softmax", norm_topk_prob=False)), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w: w.pop("lm_head.weight"), "lacks 1 tensors.*lm_head"),
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}), "no place for.*q_proj.bias"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(31)}), r"model\.norm\.weight has shape \(31,\).*\(32,\)"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "is torch.int8; valid: float32"),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny, tmp_path, change, part):
    folder = save_hf(Transformer(tiny()), tmp_path / "out")
    rewrite(folder, change)
    with pytest.raises(DataError, match=part):
        load_hf(folder)


def test_damaged_and_missing_files_are_named(tiny, tmp_path):
    with pytest.raises(DataError, match=r"config\.json is missing"):
        load_hf(tmp_path)
    folder = save_hf(Transformer(tiny()), tmp_path / "out", max_shard_bytes=16_000)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    with pytest.raises(DataError, match="file names of that folder"):
        load_hf(folder)
    index.write_text(json.dumps(names))
    shard = sorted(folder.glob("model-00002*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"model-00002.*damaged"):
        load_hf(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks 1 files.*model-00002"):
        load_hf(folder)
    index.unlink()
    with pytest.raises(DataError, match="only safetensors are read"):
        load_hf(folder)


def test_loading_leaves_the_random_state_alone_and_counters_start_at_0(tiny, tmp_path):
    model = randomised(tiny())
    model.routers()[0].load_E.fill_(7)
    folder = save_hf(model, tmp_path / "out")
    state = torch.get_rng_state()
    loaded = load_hf(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.routers()[0].load_E.any() and loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("changes", [{}, {"scoring": "softmax", "norm_topk_prob": False}])
def test_nothing_is_left_of_the_memory_that_the_model_was_given(tiny, tmp_path, monkeypatch, changes):
    folder = save_hf(Transformer(tiny(**changes)), tmp_path / "out")
    to_empty = Transformer.to_empty

    def poisoned(self, **kwargs):
        model = to_empty(self, **kwargs)
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        return model

    monkeypatch.setattr(Transformer, "to_empty", poisoned)
    assert all(tensor.isfinite().all() for tensor in load_hf(folder).state_dict().values())


def test_without_a_mup_block_a_checkpoint_is_its_own_base(tiny, tmp_path):
    model = randomised(tiny(base=Base(width=8, depth=1)))
    folder = save_hf(model, tmp_path / "out")
    values = json.loads((folder / "config.json").read_text())
    del values["mup"]
    (folder / "config.json").write_text(json.dumps(values))
    loaded = load_hf(folder).eval()
    assert loaded.config.residual_scale == 1 and loaded.config.base == Base(width=32, depth=2)
    assert replace(loaded.config, base=model.config.base) == model.config
    ids = torch.randint(0, 40, (2, 20))
    torch.testing.assert_close(loaded(ids), model.eval()(ids), atol=1e-5, rtol=0)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert torch.equal(loaded.blocks[0].attn.out.weight, file.get_tensor("model.layers.0.self_attn.o_proj.weight"))
