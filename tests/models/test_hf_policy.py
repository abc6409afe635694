"""`HFModel` against the transformers model itself, row by row without padding or cache."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_reason.errors import ConfigError
from lit_reason.models import CausalLM, HFConfig, HFModel, parameter_roles
from lit_reason.modules import token_logprobs
from lit_reason.types import PolicyBatch

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 4,
}  # fmt: skip
TOTALS = ("sequences_total", "tokens_total", "prompts_total", "max_completion")
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3_moe": EXPERTS,
    "deepseek_v3": EXPERTS | MLA,
    "mixtral": {"num_local_experts": 4, "sliding_window": 5},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "final_logit_softcapping": 3.0},  # every second layer slides
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 48},
}


def make_lm(family: str, seed: int = 0, dtype=torch.float32, attn: str = "sdpa", **changes):
    """A random model with weights so large that attention, windows and caps matter."""
    config = CONFIG_MAPPING[family](**SHAPE | FAMILIES.get(family, {}) | changes)
    experts = (
        {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    )  # the grouped product has no float64
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attn, **experts).to(dtype).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return lm


@pytest.fixture
def ragged():
    """Four right-padded rows of 3..20 tokens: the first has targets in its middle only, the third has none."""
    draw = torch.Generator().manual_seed(1)
    lengths, T = (20, 9, 13, 3), 20
    ids_BT = torch.randint(3, 61, (4, T), generator=draw)
    target_BT = torch.randint(3, 61, (4, T), generator=draw)
    mask_BT = torch.zeros(4, T)
    for row, first, last in ((0, 4, 15), (1, 2, 9), (3, 0, 3)):
        mask_BT[row, first:last] = 1
    for row, length in enumerate(lengths):
        ids_BT[row, length:] = 0
    rest = {"group_tokens_B": torch.ones(4)} | dict.fromkeys(TOTALS, torch.tensor(4.0))
    return PolicyBatch(ids_BT, target_BT, mask_BT, torch.zeros(4, T), torch.zeros(4, T), **rest), lengths


@pytest.fixture
def exact_router(monkeypatch):
    """DeepSeek's router multiplies in float32 whatever the model's dtype, and on some CPUs the order of those sums
    depends on the number of rows: here it sums in float64."""

    class Functional:
        def __getattr__(self, name):
            return getattr(F, name)

        def linear(self, x, weight):
            return F.linear(x.double(), weight.double())

    monkeypatch.setattr("transformers.models.deepseek_v3.modeling_deepseek_v3.F", Functional())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("exact_router")
def test_log_probs_are_those_of_the_model_on_each_row_alone(family, ragged):
    batch, lengths = ragged
    lm = make_lm(family, dtype=torch.float64)
    with torch.no_grad():
        ours_BT = token_logprobs(HFModel(lm), batch, temperature=0.7)[0]
        for b, length in enumerate(lengths):
            table_TV = (lm(batch.input_ids_BT[b : b + 1, :length]).logits[0] / 0.7).log_softmax(-1)
            theirs_T = table_TV.gather(1, batch.target_ids_BT[b, :length, None]).squeeze(1) * batch.mask_BT[b, :length]
            torch.testing.assert_close(ours_BT[b, :length], theirs_T, atol=1e-10, rtol=0)
    assert not ours_BT[2].any() and ours_BT.count_nonzero() == 21


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2"])
def test_gradients_are_those_of_the_rows_alone(family, ragged):
    batch, lengths = ragged
    lm = make_lm(family, dtype=torch.float64)
    token_logprobs(HFModel(lm), batch, 1.0)[0].sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}
    lm.zero_grad()
    for b, length in enumerate(lengths):
        table_TV = lm(batch.input_ids_BT[b : b + 1, :length]).logits[0].log_softmax(-1)
        chosen_T = table_TV.gather(1, batch.target_ids_BT[b, :length, None]).squeeze(1)
        (chosen_T * batch.mask_BT[b, :length]).sum().backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_in_which_nothing_counts_has_gradients_of_zero(ragged):
    batch, _ = ragged
    batch.mask_BT.zero_()
    model = HFModel(make_lm("llama"))
    token_logprobs(model, batch, 1.0)[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_only_positions_that_count_are_computed(ragged):
    batch, _ = ragged
    model, seen = HFModel(make_lm("llama")), []
    model.lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert model.states_at(batch.input_ids_BT, batch.mask_BT > 0).shape == (21, 32)
    assert seen == [(3, 15)]  # the row without targets and the five last columns are left out


def test_it_is_what_the_stages_ask_for():
    model = HFModel(make_lm("gpt2"))
    assert isinstance(model, CausalLM)
    assert (model.config.max_seq_len, model.config.vocab_size, model.config.mtp_depth) == (48, 61, 0)
    assert not model.training and HFModel(make_lm("gpt2").train()).training
    assert model.routers() == [] and model.device == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"49 tokens; this model takes 48"):
        model(torch.ones(1, 49, dtype=torch.int64))
    assert (
        HFModel(make_lm("gpt2", seed=1)).config == model.config != HFModel(make_lm("gpt2", num_hidden_layers=1)).config
    )


def test_to_bfloat16_leaves_the_rotary_frequencies_exact():
    model = HFModel(make_lm("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    exact = model.lm.model.rotary_emb.inv_freq.clone()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm.model.rotary_emb.inv_freq, exact) and not torch.equal(exact, exact.bfloat16().float())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_every_parameter_has_multiplier_1_and_head_and_embedding_no_matrix(family):
    model = HFModel(make_lm(family))
    roles = parameter_roles(model)
    assert roles.keys() >= dict(model.named_parameters()).keys()
    assert {(role.lr, role.eps) for role in roles.values()} == {(1.0, 1.0)}
    assert roles["lm.model.layers.0.self_attn.q_proj.weight"].matrices is not None
    assert roles["lm.model.embed_tokens.weight"].weight_decay == 0
    if family == "qwen2":  # tied: the head is the embedding
        assert "lm.lm_head.weight" not in dict(model.named_parameters())
    else:
        assert roles["lm.lm_head.weight"].matrices is None and roles["lm.lm_head.weight"].weight_decay == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3", "gemma2"])
def test_saved_and_built_again_and_read_by_transformers(family, tmp_path):
    lm = make_lm(family)
    folder = HFModel(lm).save(tmp_path / "a" / "model", extra=lambda f: (f / "note.txt").write_text("kept"))
    assert (folder / "note.txt").is_file() and list(folder.parent.iterdir()) == [folder]
    ids_BT = torch.arange(3, 19).view(2, 8)
    again, theirs = HFConfig(str(folder)).build(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert again.training and all(p.dtype == torch.float32 for p in again.parameters())
    with torch.no_grad():
        want = lm(ids_BT).logits
        assert torch.equal(theirs.eval()(ids_BT).logits, want)
        torch.testing.assert_close(again.eval()(ids_BT), want, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"not empty; give the name of a new folder"):
        again.save(folder)


def test_bfloat16_files_are_trained_in_float32(tmp_path):
    make_lm("qwen2").bfloat16().save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    model = HFConfig(str(tmp_path)).build()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.head.weight is model.full_head().output.weight is model.lm.model.embed_tokens.weight


def test_dropout_is_off_in_training_mode(tmp_path):
    make_lm("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).save_pretrained(tmp_path)
    model, ids_BT = HFConfig(str(tmp_path)).build(), torch.arange(3, 9)[None]
    assert model.training
    assert torch.equal(model(ids_BT), model(ids_BT))


def test_a_generation_config_that_could_not_be_saved_is_mended_at_the_start(tmp_path):
    lm = make_lm("llama")
    lm.save_pretrained(tmp_path / "old")
    values = json.loads((tmp_path / "old" / "generation_config.json").read_text()) | {"temperature": 0.6}
    (tmp_path / "old" / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"temperature"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "theirs")
    HFConfig(str(tmp_path / "old")).build().save(tmp_path / "ours")


def test_a_long_context_ends_where_longrope_would_switch():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "factor": 4.0,
    }  # fmt: skip
    lm = make_lm("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    assert HFModel(lm).config.max_seq_len == 16


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("bert", {}, "computes other logits.*causal decoder"),  # it sees what comes after
        ("jamba", {}, "layers that keep another state.*linear_attention.*valid: full_attention"),
        ("qwen3_next", EXPERTS, "layers that keep another state"),
        ("llama4_text", {"num_local_experts": 4}, "layers that keep another state.*attention_chunk_size"),
        (
            "gpt_neo",
            {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
            "attention_types",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(family, changes, said):
    with pytest.raises(ConfigError, match=said):
        HFModel(make_lm(family, attn="eager", **changes))


@pytest.mark.parametrize("change", ["before", "after", "cap"])
def test_a_head_that_does_more_is_refused(change):
    lm = make_lm("llama")
    with torch.no_grad():
        lm.lm_head.weight *= 1e-3  # logits so small that a cap of 30 changes nothing
    finish = {"before": lambda x: x, "after": lambda x: 1.5 * x, "cap": lambda x: torch.tanh(x / 30) * 30}[change]

    def forward(input_ids, **kwargs):
        states = lm.model(input_ids, **kwargs).last_hidden_state / (4 if change == "before" else 1)
        return CausalLMOutput(logits=finish(lm.lm_head(states)))

    HFModel(lm)
    lm.forward = forward
    with pytest.raises(ConfigError, match=r"its head"):
        HFModel(lm)


def test_folders_that_cannot_be_loaded_say_what_to_type(tmp_path):
    with pytest.raises(ConfigError, match=r"model.name=\./nowhere: there is no such folder. Type model.name=PATH"):
        HFConfig("./nowhere")
    with pytest.raises(ConfigError, match=r"holds no config.json"):
        HFConfig(str(tmp_path))
    lm = make_lm("llama")
    lm.save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"only pytorch_model.bin: a pickle can run code"):
        HFConfig(str(tmp_path / "pickled"))
    save_file({"adapter": torch.zeros(1)}, tmp_path / "pickled" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"no causal language model that transformers can load from safetensors"):
        HFConfig(str(tmp_path / "pickled")).build()
    AutoModelForSequenceClassification.from_config(lm.config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConfigError, match=r"lack 1 of the model's tensors .lm_head.weight"):
        HFConfig(str(tmp_path / "classifier")).build()
    t5 = tmp_path / "t5"
    t5.mkdir()
    (t5 / "config.json").write_text('{"model_type": "t5"}')
    weights = t5 / "model.safetensors"
    weights.write_bytes((tmp_path / "classifier" / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"is no causal language model"):
        HFConfig(str(t5)).build()
    (t5 / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (t5 / "mine.py").write_text("raise SystemExit('code of the folder ran')")
    with pytest.raises(ConfigError, match=r"without code of its own"):
        HFConfig(str(t5)).build()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"dtype": "float16"}, "model.dtype='float16': .*bfloat16"), ({"attn": "flash"}, "model.attn='flash'.*sdpa")],
)
def test_settings_that_do_not_exist(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        HFConfig(str(tmp_path), **changes)
