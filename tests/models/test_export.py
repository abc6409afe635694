"""What an engine is pushed is what a checkpoint would hold, bit for bit."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_reason.errors import ConfigError
from lit_reason.models import Base, HFModel, Transformer
from lit_reason.models.adapters import adapters_off, merged_copy
from lit_reason.models.export import checkpoint_config, checkpoint_tensors
from lit_reason.models.hf import load_hf, save_hf
from lit_reason.models.lora import LoRA

SHAPES = {
    "plain": {},
    "low-rank queries": {"q_lora_rank": 8},
    "muP, folded": {"depth": 3, "base": Base(width=16, depth=2)},  # the branch multiplier is no power of two
    "softmax": {"scoring": "softmax", "norm_topk_prob": False},
    "shared experts, groups": {"shared_experts": 2, "expert_groups": 4, "groups_per_token": 2},
    "dense": {"experts": 0, "experts_per_token": 0, "first_dense": 2, "shared_experts": 0},
    "multi-token prediction": {"mtp_depth": 1},
}
FAMILY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make(tiny, shape: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny(**SHAPES[shape]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if model.config.scoring == "sigmoid":
            for router in model.routers():
                router.bias_E.normal_()
    return model


def saved(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shape", SHAPES)
def test_of_ours_it_is_what_save_hf_writes(shape, tiny, tmp_path):
    model = make(tiny, shape)
    folder = save_hf(model, tmp_path / "m")
    written = {n: t for n, t in saved(folder).items() if not n.startswith(f"model.layers.{model.config.depth}.")}
    found = dict(checkpoint_tensors(model, torch.float32))
    assert_same(found, written)
    biases = [name for name in found if name.endswith("e_score_correction_bias")]
    assert len(biases) == (len(model.routers()) - model.config.mtp_depth if model.config.scoring == "sigmoid" else 0)


def test_folding_is_not_forgotten(tiny):
    """The muP shape would pass the test above with both sides unfolded: here against the definition."""
    model = make(tiny, "muP, folded")
    scale = model.config.residual_scale
    assert scale not in (0.25, 0.5, 1.0)
    found = dict(checkpoint_tensors(model, torch.float32))
    expected = (model.blocks[0].attn.out.weight.double() * scale).float()
    assert torch.equal(found["model.layers.0.self_attn.o_proj.weight"], expected)


def test_in_bfloat16_everything_is_rounded_once_but_the_routers_bias(tiny):
    model = make(tiny, "plain")
    exact = dict(checkpoint_tensors(model, torch.float32))
    for name, tensor in checkpoint_tensors(model, torch.bfloat16):
        if name.endswith("e_score_correction_bias"):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, exact[name])
            assert not torch.equal(tensor, tensor.bfloat16().float())
        else:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16()), name


def test_adapters_are_folded_in_without_touching_the_model(tiny):
    model = make(tiny, "plain")
    base = dict(checkpoint_tensors(copy.deepcopy(model), torch.float32))
    LoRA(rank=2).apply(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(checkpoint_tensors(model, torch.float32))
    assert_same(found, dict(checkpoint_tensors(merged_copy(model), torch.float32)))
    moved = [name for name in base if not torch.equal(found[name], base[name])]
    assert any("kv_b_proj" in n for n in moved) and any("experts.3.down_proj" in n for n in moved)
    assert not any("embed_tokens" in n or "mlp.gate." in n for n in moved)
    with adapters_off(model):
        assert_same(dict(checkpoint_tensors(model, torch.float32)), base)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_whole_merged_model_is_never_in_memory(tiny):
    """Of the folded tensors only the last is kept: with all of them held, all would be alive at the end."""
    import weakref

    model = make(tiny, "plain")
    LoRA(rank=2).apply(model)
    alive, most = [], 0
    for _, tensor in checkpoint_tensors(model, torch.bfloat16):
        alive.append(weakref.ref(tensor))
        del tensor
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) > 40 and most <= 2


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3_moe", EXPERTS),
        (
            "deepseek_v3",
            EXPERTS
            | {
                "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                "n_routed_experts": 4,
            },
        ),
    ],
)  # fmt: skip
def test_of_transformers_it_is_what_save_pretrained_writes(family, changes, tmp_path):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILY | changes)).float().eval()
    with torch.no_grad():
        for name, buffer in lm.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    lm.save_pretrained(tmp_path)
    written = saved(tmp_path)
    assert_same(dict(checkpoint_tensors(HFModel(lm), torch.float32)), written)
    for name, tensor in checkpoint_tensors(HFModel(lm), torch.bfloat16):
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(tensor, written[name] if kept else written[name].bfloat16()), name


def test_its_config_loads_as_the_same_model(tiny, tmp_path):
    from safetensors.torch import save_file

    model = make(tiny, "multi-token prediction")
    document = checkpoint_config(model, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(document))
    save_file({n: t.contiguous() for n, t in checkpoint_tensors(model, torch.float32)}, tmp_path / "model.safetensors")
    again = load_hf(tmp_path)
    assert again.config.mtp_depth == 0 and document["topk_method"] == "noaux_tc"
    ids_BT = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids_BT), model.eval()(ids_BT))


def test_biases_that_the_format_cannot_hold_are_not_left_out_in_silence(tiny):
    model = make(tiny, "softmax")
    model.routers()[0].bias_E[1] = 1e-3
    with pytest.raises(ConfigError, match="has no place for"):
        list(checkpoint_tensors(model, torch.float32))


def test_a_model_without_a_format_is_refused():
    with pytest.raises(ConfigError, match=r"a Linear has no checkpoint format: push a lit_reason"):
        list(checkpoint_tensors(torch.nn.Linear(1, 1), torch.float32))
    with pytest.raises(ConfigError, match=r"a Linear has no config"):
        checkpoint_config(torch.nn.Linear(1, 1), torch.float32)


def test_of_transformers_the_config_names_the_class():
    """A model from a config does not name it, and vLLM then takes a class without a head."""
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**FAMILY))
    document = checkpoint_config(HFModel(lm), torch.bfloat16)
    assert document["architectures"] == ["Qwen3ForCausalLM"] and document["dtype"] == "bfloat16"
