"""Compiled layers: the same numbers from one compilation, and nothing left behind."""

import torch
from torch import nn

from lit_reason.callbacks import CompileModel


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def stranger(depth=3):
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Linear(8, 8), "layers": nn.Sequential(*(Layer() for _ in range(depth)))})


def test_layers_share_one_compilation_and_compute_the_same(monkeypatch):
    model, plain, made = stranger().double(), stranger().double(), []

    def count(graph, _):
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    real = torch.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: real(function, backend=count))
        callback = CompileModel()
        report = callback.apply(model)
    assert list(report.changed) == ["layers.0", "layers.1", "layers.2"]
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(model["layers"](x), plain["layers"](x))
    assert len(made) == 1
    callback.undo()
    assert type(model["layers"][0]) is Layer


def test_what_is_compiled_already_is_declined():
    model = stranger(2)
    model["layers"][1].compile(backend="eager")
    report = CompileModel().apply(model)
    assert report.declined == {"layers.1": "it is compiled already"} and list(report.changed) == ["layers.0"]
