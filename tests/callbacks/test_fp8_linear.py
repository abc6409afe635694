"""Linear layers in FP8: which are taken, which are kept as DeepSeek-V3 keeps them, and what the numbers do."""

import copy

import pytest
import torch
from lit_kernels.dispatch import UnsupportedError
from torch import nn

from lit_reason.callbacks import FP8Linear
from lit_reason.errors import ConfigError
from lit_reason.models import ModelConfig, Transformer

SHAPE = {
    "vocab_size": 80, "width": 64, "depth": 2, "heads": 2, "kv_lora_rank": 32, "experts": 4, "ffn_width": 64,
    "expert_width": 32,
}  # fmt: skip


def ours():
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE))


def test_what_stays_as_deepseek_v3_keeps_it():
    model = ours()
    report = FP8Linear(backend="emulate", min_features=0).apply(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(report.changed) | set(report.declined) == linear
    assert report.declined == {"head": "an output head stays as it is"}
    parts = {name.split(".", 2)[2] for name in report.changed}
    assert parts == {"attn.q", "attn.kv_a", "attn.kv_b", "attn.out", "ffn.gate_up", "ffn.down"} | {
        "ffn.shared.gate_up",
        "ffn.shared.down",
    }


class Stranger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(64, 32), nn.Linear(32, 128), nn.Linear(128, 32)
        self.odd, self.gate = nn.Linear(32, 24), nn.Linear(32, 16)
        self.tied = nn.Linear(32, 64, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, ids):
        return self.tied(self.down(torch.relu(self.up(self.embed(ids)))))


def test_sizes_names_and_heads_of_a_stranger():
    report = FP8Linear(backend="emulate", min_features=32).apply(Stranger())
    assert list(report.changed) == ["up", "down"]
    assert report.declined["tied"] == "an output head stays as it is"
    assert report.declined["gate"] == "keep names it" and "16" in report.declined["odd"]
    assert FP8Linear(backend="emulate").apply(Stranger()).declined["up"] == "128 x 32 is below min_features=2048"
    report = FP8Linear(backend="emulate", min_features=0, keep=["do*"]).apply(Stranger())
    assert list(report.changed) == ["up", "gate"]


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleList([Special(32, 32), nn.Linear(32, 32)])
    report = FP8Linear(backend="emulate", min_features=0).apply(model)
    assert report.declined == {"0": "a Special has a forward of its own"} and list(report.changed) == ["1"]


def test_gradients_are_those_of_the_plain_layer_but_for_fp8():
    model, ids = Stranger(), torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))

    def step(model):
        model.zero_grad()
        model(ids).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, callback = step(copy.deepcopy(model)), FP8Linear(backend="emulate", min_features=0)
    callback.apply(model)
    found = step(model)
    assert found.keys() == expected.keys()
    for name in ("up.weight", "down.weight"):  # 3.7% a product (28.7 dB), and rectifiers that flip
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert 0.01 < error < 0.2, (name, error)
    callback.undo()
    again = step(model)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_without_a_gpu_numbers_must_be_asked_for():
    model = Stranger()
    FP8Linear(min_features=0).apply(model)
    with pytest.raises(UnsupportedError, match="emulate"):
        model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ConfigError, match="backend='cuda'; valid: auto, torch, triton, emulate"):
        FP8Linear(backend="cuda")


def test_fit_refuses_what_cannot_run_before_the_first_batch(fit):
    class Wide(fit.Tiny):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 64, bias=False), nn.Linear(64, 1, bias=False)
            self.middle = nn.Linear(64, 64)

        def training_step(self, batch, batch_idx):
            raise AssertionError("a batch was reached")

    with pytest.raises(ConfigError, match=r"FP8Linear: .*emulate"):
        fit([FP8Linear(min_features=0)], module=Wide())
