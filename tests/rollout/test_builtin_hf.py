"""The builtin engine on models of transformers, against their own `generate`."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_reason.errors import ConfigError, RolloutError
from lit_reason.loop.batching import collate
from lit_reason.models import HFModel
from lit_reason.modules import token_logprobs
from lit_reason.rollout import BuiltinEngine, Sampling

SHAPE = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 260,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 4,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": EXPERTS,
    "deepseek_v3": EXPERTS | MLA,
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "sliding_window": 5},
    "gemma2": {"sliding_window": 5, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {},
}


@pytest.fixture
def make_hf():
    """`make_hf(family)`: random, with weights so large that the context matters; the stop token comes now and then."""

    def make(family: str, seed: int = 0, **changes) -> HFModel:
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPE | FAMILIES[family] | changes))
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.25)
            lm.get_output_embeddings().weight[260] *= 2.5
        return HFModel(lm.eval())

    return make


def pushed(tokenizer, model, **kwargs) -> BuiltinEngine:
    engine = BuiltinEngine(tokenizer, **{"dtype": "float32"} | kwargs)
    engine.push(model, version=0)
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_on_each_prompt_alone(family, make_hf, prompts, tokenizer):
    """Four models, until rows of 3..19 tokens end at different steps: 4 prompts, 6 copies each."""
    lengths = set()
    for seed in range(4):
        model = make_hf(family, seed)
        asked = prompts(24)
        out = pushed(tokenizer, model).generate(asked, Sampling(0.0, max_tokens=30), [0] * 24)
        for prompt, completion in list(zip(asked, out, strict=True))[:4]:
            ids = torch.tensor([prompt.token_ids])
            theirs = model.lm.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, eos_token_id=260
            )
            assert list(completion.token_ids) == theirs[0, ids.shape[1] :].tolist()
            lengths.add(len(completion.token_ids))
        assert [c.token_ids for c in out[4:]] == [c.token_ids for c in out[:4]] * 5
    assert len(lengths) > 2 and min(lengths) < 30, "rows must leave the batch while it runs"


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_log_probs_are_the_trainers(family, make_hf, prompts, tokenizer):
    model, asked = make_hf(family), prompts(16)
    out = pushed(tokenizer, model).generate(asked, Sampling(0.8, max_tokens=30), range(16))
    assert len({len(c.token_ids) for c in out}) > 2
    batch = collate(asked, out, max_completion=30, pad_id=tokenizer.pad_id)
    with torch.no_grad():
        trainers_BT = token_logprobs(model, batch, temperature=0.8)[0]
    torch.testing.assert_close(batch.rollout_logprobs_BT * batch.mask_BT, trainers_BT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_row_is_the_same_alone_and_in_any_batch(family, make_hf, prompts, tokenizer):
    engine, asked = pushed(tokenizer, make_hf(family)), prompts(40)
    together = engine.generate(asked, Sampling(1.0, max_tokens=40), range(40))
    lengths = sorted(len(c.token_ids) for c in together)
    assert lengths[12] < lengths[-1], "the batch must shrink while it runs"
    engine.max_rows = 7
    apart = engine.generate(asked, Sampling(1.0, max_tokens=40), range(40))
    assert [c.token_ids for c in apart] == [c.token_ids for c in together]


def test_the_context_limit_ends_a_row(make_hf, prompts, tokenizer):
    model = make_hf("gpt2", max_position_embeddings=24)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[260] = 0
    for prompt, c in zip(
        prompts(4), pushed(tokenizer, model).generate(prompts(4), Sampling(0.0, max_tokens=100), [0] * 4), strict=True
    ):
        assert (c.finish_reason, len(prompt.token_ids) + len(c.token_ids)) == ("length", 24)


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3"])
def test_a_push_renews_the_bfloat16_copy_whole(family, make_hf, tokenizer):
    first, second = make_hf(family), make_hf(family, seed=1)
    engine = pushed(tokenizer, first, dtype="bfloat16")
    with torch.no_grad():
        for name, buffer in second.named_buffers():  # inv_freq, and the biases that choose DeepSeek's experts
            buffer.add_(0.5 if "bias" in name else 0)
    held, copied = engine.model, copy.deepcopy(second).bfloat16().state_dict()
    engine.push(second, version=1)
    assert engine.model is held and engine.version() == 1
    now = engine.model.state_dict()
    assert now.keys() == copied.keys() and all(torch.equal(now[name], copied[name]) for name in now)
    tied = engine.model.lm.get_output_embeddings().weight is engine.model.lm.get_input_embeddings().weight
    assert tied == (family == "qwen3")
    for (name, got), (_, want) in zip(engine.model.named_buffers(), second.named_buffers(), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want), name
    assert {p.dtype for p in second.parameters()} == {torch.float32}


def test_another_architecture_replaces_the_copy(make_hf, tokenizer, prompts):
    engine = pushed(tokenizer, make_hf("llama"), dtype="bfloat16")
    engine.push(make_hf("llama", num_hidden_layers=1), version=1)
    assert len(engine.model.lm.model.layers) == 1
    assert len(engine.generate(prompts(2), Sampling(1.0, max_tokens=4), [0, 1])) == 2


def test_what_the_engine_cannot_run_is_refused(make_hf, tokenizer):
    model = make_hf("llama")
    with pytest.raises(ConfigError, match=r"a HFModel has no multi-token.*Type rollout.engine.speculative=false"):
        pushed(tokenizer, model, speculative=True)
    with pytest.raises(RolloutError, match=r"got LlamaForCausalLM: wrap a model of transformers in .*HFModel"):
        pushed(tokenizer, model.lm)
