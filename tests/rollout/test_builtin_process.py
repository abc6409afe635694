"""The builtin engine in a process of its own against itself in this one, and what both say they hold."""

import pytest
import torch

from lit_reason.errors import ConfigError, WeightSyncError
from lit_reason.models import HFModel
from lit_reason.rollout import BuiltinEngine, BuiltinProcess, Provable, Sampling
from lit_reason.sync import Proof, ProvenEngine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_of_its_own_changes_no_token(model, prompts, tokenizer, dtype):
    asked, sampling = prompts(12), Sampling(1.0, max_tokens=16)
    here, there = BuiltinEngine(tokenizer, dtype), BuiltinProcess(tokenizer, dtype)
    try:
        for version in (0, 1):
            with torch.no_grad():
                model.head.weight[5:9].mul_(-1)
            here.push(model, version)
            there.push(model, version)
            expected = here.generate(asked, sampling, range(12), [3] * 12)
            found = there.generate(asked, sampling, range(12), [3] * 12)
            assert found == expected and {one.version for one in found} == {version}
            for one, other in zip(found, expected, strict=True):
                assert one.experts_SLK is not None and torch.equal(one.experts_SLK, other.experts_SLK)
            assert here.held() == there.held()
    finally:
        there.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_proves_what_it_holds(model, prompts, tokenizer, dtype):
    inner = BuiltinEngine(tokenizer, dtype)
    assert isinstance(inner, Provable)
    engine = ProvenEngine(inner, Proof([prompt.token_ids for prompt in prompts(4)]))
    engine.push(model, 0)
    assert engine.measured["sync/tensors"] == len(model.state_dict())
    assert engine.measured["sync/gap"] < (1e-6 if dtype == "float32" else 0.1)


def test_its_proof_names_what_differs(model, prompts, tokenizer):
    class Forgetful(BuiltinEngine):
        def push(self, model, version):
            super().push(model, version)
            self.model.blocks[1].ffn.router.bias_E += 1e-3

    engine = ProvenEngine(Forgetful(tokenizer), Proof([prompt.token_ids for prompt in prompts(4)]))
    with pytest.raises(WeightSyncError, match=r"blocks\.1\.ffn\.router\.bias_E"):
        engine.push(model, 3)


def test_next_tokens_are_those_of_the_forward(model, prompts, tokenizer):
    engine = BuiltinEngine(tokenizer, "float32")
    engine.push(model, 0)
    for prompt, one in zip(prompts(3), engine.next_token([p.token_ids for p in prompts(3)], top=4), strict=True):
        with torch.no_grad():
            expected = model.eval()(torch.tensor([prompt.token_ids]))[0, -1].log_softmax(-1).topk(4)
        assert list(one.logprobs) == expected.indices.tolist() and one.cached == 0
        torch.testing.assert_close(torch.tensor(list(one.logprobs.values())), expected.values, atol=1e-5, rtol=0)


def test_a_model_of_transformers_is_refused(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ConfigError, match="rollout=builtin_process runs our own models, got a HFModel"):
        BuiltinProcess(tokenizer).push(HFModel(LlamaForCausalLM(config)), 0)
