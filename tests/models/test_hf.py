"""DeepSeek checkpoint folders: parity with transformers, muP's way out and back, FP8, shards, and what is refused."""

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_reason.errors import ConfigError, DataError
from lit_reason.models import Base, Transformer, hf
from lit_reason.models.hf import fold, load_hf, save_hf, unfold
from lit_reason.models.hf_config import from_hf_config
from lit_reason.models.hf_files import ROUNDING, Shards, dequantise
from lit_reason.models.hf_slots import slots


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


# --- out and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("depth", "base_depth", "rounds"), [(4, 1, False), (3, 2, True), (2, 7, True), (2, 2, False)]
)  # 1/4, 2/3, 7/2, 1
def test_the_round_trip_is_exact_whatever_the_residual_multiplier(tiny, tmp_path, dtype, depth, base_depth, rounds):
    base = Base(width=16, depth=base_depth, heads=1, expert_width=8)
    model = randomised(
        tiny(depth=depth, base=base, init_gain=0.7, branch_gain=0.6, embed_std=0.3, balance_loss=2e-4), dtype
    )
    save_hf(model, tmp_path / "out")
    assert (tmp_path / "out" / ROUNDING).exists() == rounds
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
    (folder / ROUNDING).unlink()
    ours, again = model.state_dict(), load_hf(folder).state_dict()
    for name in ours:
        torch.testing.assert_close(again[name], ours[name], rtol=2**-23, atol=0)


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
    read = Shards.read

    def counted(self, name):
        tensor = read(self, name)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Shards, "read", counted)
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


def test_an_fp8_checkpoint_is_dequantised_into_bfloat16(tiny, edit, tmp_path):
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


def test_rotary_tables_are_left_out_and_a_promised_layer_may_be_missing(tiny, edit, tmp_path):
    model = randomised(tiny())
    folder = save_hf(model, tmp_path / "out")
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    edit(folder, num_nextn_predict_layers=1)  # what transformers writes, layer or not
    assert same(load_hf(folder), model)


# --- what is refused


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
