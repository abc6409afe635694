"""Adam-mini: Adam where a block is one entry, one second moment per head or row elsewhere."""

import math

import pytest
import torch
from torch import nn

from lit_reason.models.mup import Matrices, Matrix, parameter_roles
from lit_reason.optim import AdamMini
from lit_reason.optim.adam_mini import AdamMiniOptimizer


def test_with_one_entry_per_row_it_is_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(5, 1)), nn.Parameter(torch.empty(5, 1))
    theirs.data.copy_(ours.data)
    layout = {ours: Matrices(1, (Matrix("matrix", 5, 1, 5, 1),))}
    optimizer = AdamMiniOptimizer([{"params": [ours]}], layout, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    for _ in range(20):
        ours.grad = torch.randn(5, 1)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["query", "matrix"])
def test_a_head_has_one_second_moment_and_a_row_its_own(name):
    """First step, no decay: m / (1 - b1) = g and v / (1 - b2) = mean g^2, so the step is lr g / rms(g of the block)."""
    p = nn.Parameter(torch.zeros(4, 3))  # two heads of two rows
    g = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    optimizer = AdamMiniOptimizer([{"params": [p]}], {p: Matrices(2, (Matrix(name, 2, 3, 2, 3),))}, lr=0.1)
    p.grad = g.clone()
    optimizer.step()
    head = [math.sqrt(9 / 6)] * 2 + [math.sqrt(15 / 6)] * 2
    row = [math.sqrt(3), 1.0, 1.0, 2.0]
    rms = torch.tensor(head if name == "query" else row)[:, None]
    torch.testing.assert_close(p.detach(), -0.1 * g / rms)


def test_second_moments_of_the_model(make_model, set_gradients):
    """Heads for queries, keys and the shared rotary key; output rows, per expert, for everything else."""
    model = make_model(width=64)
    optimizer, _ = AdamMini(lr=0.01).build(model, 10)
    set_gradients(model)
    optimizer.step()
    counts = {
        name.removeprefix("blocks.1."): [v.numel() for v in optimizer.state[p]["exp_avg_sq"]]
        for name, p in model.named_parameters()
        if name.startswith("blocks.1.") and parameter_roles(model)[name].matrices
    }
    assert counts == {
        "attn.q.0.weight": [12],
        "attn.q.2.weight": [2],  # heads
        "attn.kv_a.weight": [8, 1],
        "attn.kv_b.weight": [2, 2 * 10],  # heads of keys, rows of values
        "attn.out.weight": [64],
        "ffn.experts.gate_up": [4 * 2 * 16],
        "ffn.experts.down": [4 * 64],
        "ffn.shared.gate_up.weight": [2 * 16],
        "ffn.shared.down.weight": [64],
    }
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():  # AdamW's multipliers
        assert rate_of[id(p)] == pytest.approx(0.01 * parameter_roles(model)[name].lr), name
