"""Losses without logits: a transformers model, a stranger's, and our own policies' log-probs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_reason.callbacks import FusedLogProb
from lit_reason.callbacks.fused_logprob import LazyHead
from lit_reason.errors import ConfigError
from lit_reason.models import HFModel, ModelConfig, Transformer
from lit_reason.modules import PretrainModule
from lit_reason.modules.logprobs import head_logprobs
from lit_reason.optim import AdamW
from lit_reason.types import TokenBatch

V = 1000


class Largest(TorchDispatchMode):
    """Numbers in the largest memory that any operation makes, backward passes included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        real = (x for x in tree_leaves(out) if type(x) is torch.Tensor and not x.is_meta)
        self.elements = max(self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in real), 0)
        return out


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=V, **sizes, **changes)).train()


def step(model, ids):
    model.zero_grad()
    with Largest() as seen:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, seen.elements


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loss_and_gradients_without_logits(tied, monkeypatch):
    monkeypatch.setattr("lit_kernels.logprobs.TILE", {"cpu": (16, 64)})
    model, ids = (
        llama(tie_word_embeddings=tied),
        torch.randint(0, V, (4, 32), generator=torch.Generator().manual_seed(1)),
    )
    ids[0, :5] = 0
    expected_loss, expected, plain_elements = step(copy.deepcopy(model), ids)
    callback = FusedLogProb()
    assert list(callback.apply(model).changed) == ["lm_head"]
    loss, found, elements = step(model, ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert elements <= 2 * V * 16 < 4 * 31 * V <= plain_elements  # the weight and its gradient are the largest
    callback.undo()
    assert type(model.lm_head) is nn.Linear


def test_generation_and_evaluation_see_plain_logits():
    model, ids = llama(), torch.randint(0, V, (1, 8))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    FusedLogProb().apply(model)
    with torch.no_grad():
        assert type(model(input_ids=ids).logits) is torch.Tensor
        assert torch.equal(model.train()(input_ids=ids).logits, expected)


class Stranger(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.embed, self.out = nn.Embedding(V, 16), nn.Linear(16, V, bias=bias)

    def forward(self, ids):
        return self.out(torch.tanh(self.embed(ids)))


def test_a_strangers_loss_and_a_look_at_the_logits():
    torch.manual_seed(0)
    model, ids, targets = Stranger().double(), torch.arange(12).view(3, 4), torch.arange(12).flip(0)

    def run(model):
        model.zero_grad()
        logits = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=3)
        loss.backward()
        return loss.detach(), model.out.weight.grad.clone(), logits.argmax(-1)

    expected = run(model)
    FusedLogProb().apply(model)
    for ours, theirs in zip(run(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_heads_are_found_by_shape_or_name():
    report = FusedLogProb().apply(Stranger(bias=True))
    assert report.declined == {"out": "it has a bias"} and not report.changed
    other = nn.ModuleDict({"body": nn.Linear(8, 8), "vocab": nn.Linear(8, 50, bias=False)})
    assert not FusedLogProb().apply(other).changed
    assert list(FusedLogProb(heads=["vocab"]).apply(other).changed) == ["vocab"]
    with pytest.raises(ValueError, match="backend='cuda'; valid: auto, torch, triton"):
        FusedLogProb(backend="cuda")


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_our_policies_ask_the_head(kind, monkeypatch):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=V, width=32, depth=1, heads=2)) if kind == "ours" else HFModel(llama())
    model = model.double().train()
    states = torch.randn(20, model.head.in_features, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, V, (20,))
    weight = torch.randn(2, 20, dtype=torch.float64)

    def run():
        states.grad = None
        logprob, entropy = head_logprobs(model.head, states, target, 0.7)
        (weight[0] * logprob + weight[1] * entropy).sum().backward()
        return logprob.detach(), entropy.detach(), states.grad

    expected = run()
    FusedLogProb().apply(model)
    called = []
    fused = LazyHead.logprobs
    monkeypatch.setattr(LazyHead, "logprobs", lambda self, *args: called.append(1) or fused(self, *args))
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert called == [1]


class Capped(nn.Linear):
    def forward(self, x):
        return 5 * torch.tanh(super().forward(x) / 5)


def test_what_is_no_plain_head_is_left_alone():
    model = Stranger()
    model.out = Capped(16, V, bias=False)
    assert FusedLogProb().apply(model).declined == {"out": "a Capped has a forward of its own"}
    model = Stranger()
    model.out.forward = lambda x: x @ model.out.weight.T * 2
    assert "replaced on the object" in FusedLogProb().apply(model).declined["out"]
    square = nn.ModuleDict({"positions": nn.Embedding(16, 16), "k_proj": nn.Linear(16, 16, bias=False)})
    assert not FusedLogProb().apply(square).changed
    with pytest.raises(ConfigError, match=r"heads='out'; valid: a list. Type heads=\['out'\]"):
        FusedLogProb(heads="out")


def test_a_hook_on_the_head_is_not_gone_round():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=V, width=32, depth=1, heads=2)).double().train()
    model.head.register_forward_hook(lambda head, args, out: out * 0.5)
    states, target = torch.randn(4, 32, dtype=torch.float64), torch.arange(4)
    expected = head_logprobs(model.head, states, target, 1.0)
    FusedLogProb().apply(model)
    for ours, theirs in zip(head_logprobs(model.head, states, target, 1.0), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_pretraining_makes_no_logits(monkeypatch):
    monkeypatch.setattr("lit_kernels.logprobs.TILE", {"cpu": (16, 64)})
    monkeypatch.setattr("lit_kernels.lazy_logits.AT_ONCE", 16 * V)
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=V, width=32, depth=1, heads=2, ffn_width=32)
    module = PretrainModule(Transformer(config), AdamW())
    ids = torch.randint(0, V, (4, 33))
    batch = TokenBatch(ids[:, :-1], ids[:, 1:], torch.ones(4, 32))

    def run():
        module.zero_grad()
        with Largest() as seen:
            cross_entropy, *_, correct = module._losses(batch)
            cross_entropy.backward()
        return cross_entropy.detach(), correct, module.model.head.weight.grad.clone(), seen.elements

    *expected, plain = run()
    FusedLogProb().apply(module)
    *found, largest = run()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert largest <= 32 * V < 4 * 32 * V <= plain
