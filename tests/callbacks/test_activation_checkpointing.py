"""Recomputed layers: the same numbers, less memory, and buffers that move once."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_reason.callbacks import ActivationCheckpointing, CompileModel
from lit_reason.callbacks.activation_checkpointing import Checkpointed
from lit_reason.errors import ConfigError
from lit_reason.models import ModelConfig, Transformer

SHAPE = {"vocab_size": 40, "width": 32, "depth": 3, "heads": 2, "experts": 4, "ffn_width": 64, "expert_width": 32}


class Layer(nn.Module):
    """Counts its calls in a buffer, as batch norm does, and drops out."""

    def __init__(self, drop, width=16):
        super().__init__()
        self.drop = drop
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, scale=1.0):
        with torch.no_grad():
            self.calls += 1
        hidden = nn.functional.dropout(nn.functional.gelu(self.up(x)), self.drop, self.training)
        return x + scale * self.down(hidden)


class Stranger(nn.Module):
    def __init__(self, depth=3, drop=0.5):
        super().__init__()
        self.layers = nn.ModuleList(Layer(drop) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


def step(model, x):
    """Loss, gradients and buffers after one backward pass from seed 0."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}


def same(found, expected):
    assert torch.equal(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["stranger", "ours"])
def test_every_bit_is_the_same(kind):
    torch.manual_seed(1)
    model = Stranger() if kind == "stranger" else Transformer(ModelConfig(**SHAPE))
    x = torch.randn(4, 16) if kind == "stranger" else torch.randint(0, 40, (2, 12))
    expected, callback = step(copy.deepcopy(model), x), ActivationCheckpointing()
    report = callback.apply(model)
    assert len(report.changed) == 3 and not report.declined
    same(step(model, x), expected)  # a layer that moved its buffers twice, or drew other noise, would differ
    callback.undo()
    assert not any(isinstance(module, Checkpointed) for module in model.modules())


def test_only_inputs_are_kept():
    model, x = Stranger(), torch.randn(64, 16)

    def activations():
        """Numbers that wait for the backward pass, without the weights'."""
        weights, kept = {p.data_ptr() for p in model.parameters()}, []

        def pack(tensor):
            kept.append(tensor.numel() if tensor.data_ptr() not in weights else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x).sum()
        return sum(kept)

    plain = activations()
    ActivationCheckpointing().apply(model)
    assert activations() <= 3 * x.numel() < plain / 5  # one input a layer


def test_every_second_and_names():
    report = ActivationCheckpointing(every=2).apply(Stranger(4))
    assert list(report.changed) == ["layers.0", "layers.2"] and list(report.declined) == ["layers.1", "layers.3"]
    report = ActivationCheckpointing(layers=["layers.1"]).apply(Stranger(4))
    assert list(report.changed) == ["layers.1"]
    assert not ActivationCheckpointing().apply(nn.Linear(2, 2)).changed
    with pytest.raises(ConfigError, match="every=0; valid: a whole number of 1 or more"):
        ActivationCheckpointing(every=0)


def test_nothing_is_recomputed_without_gradients():
    model = Stranger()
    ActivationCheckpointing().apply(model)
    model.eval()(torch.randn(2, 16)).sum().backward()
    with torch.no_grad():
        model.train()(torch.randn(2, 16))
    assert [layer.calls.item() for layer in model.layers] == [2, 2, 2]


@pytest.mark.parametrize("first", [ActivationCheckpointing, CompileModel])
def test_with_compile_in_either_order(first):
    model, x = Stranger(2, drop=0.0).double(), torch.randn(4, 16, dtype=torch.float64)
    expected, callbacks = step(copy.deepcopy(model), x), [ActivationCheckpointing(), CompileModel()]
    for callback in callbacks if first is ActivationCheckpointing else callbacks[::-1]:
        callback.apply(model)
    loss, gradients, buffers = step(model, x)
    torch.testing.assert_close(loss, expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient)
    assert all(calls == 1 for calls in buffers.values())


@pytest.mark.parametrize("callback", [ActivationCheckpointing, CompileModel])
def test_transformers_with_padding_and_its_cache(callback):
    """A layer that is called again would find its own keys in the cache."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=40, **sizes), attn_implementation="eager").train()
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    ids = torch.randint(0, 40, (2, 8))

    def gradients(model):
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(model)
    assert len(callback().apply(model).changed) == 2
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_nothing_is_offloaded_where_there_is_no_other_memory():
    with pytest.raises(ConfigError, match=r"offload=True on a cpu.*Type offload=False"):
        ActivationCheckpointing(offload=True).check(torch.device("cpu"))
