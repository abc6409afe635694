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
from lit_reason.models import HFModel, ModelConfig, Transformer
from lit_reason.modules.logprobs import head_logprobs

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
