"""SOAP and Shampoo see matrices one by one, with muP's factor; what is missing is named."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from lit_reason.errors import ConfigError
from lit_reason.models.mup import Matrices, Matrix, parameter_roles
from lit_reason.optim import SOAP, Shampoo
from lit_reason.optim.preconditioned import PerMatrix, lr_factor

library = pytest.importorskip("pytorch_optimizer")


def soap(groups):
    return library.SOAP(groups, betas=(0.9, 0.95), precondition_frequency=2)


def shampoo(groups):
    return library.Shampoo(groups, weight_decouple=True)


@pytest.mark.parametrize("make", [soap, shampoo])
def test_each_expert_and_half_moves_as_the_library_moves_it_alone(make):
    """gate_up of 3 experts, rows 4 + 4 of 6 columns; the base has 2 rows of 6 columns: factor sqrt(2)."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 6))
    alone = [nn.Parameter(m.clone()) for m in stack.detach().reshape(6, 4, 6)]
    layout = {stack: Matrices(2, (Matrix("gate_up", 4, 6, 2, 6),))}
    ours = PerMatrix([{"params": [stack], "lr": 0.1, "weight_decay": 0.2}], layout, make)
    root = math.sqrt(2)
    theirs = [make([{"params": [m], "lr": 0.1 * root, "weight_decay": 0.2 / root}]) for m in alone]
    for _ in range(6):
        stack.grad = torch.randn(3, 8, 6)
        for m, gradient, optimizer in zip(alone, stack.grad.clone().reshape(6, 4, 6), theirs, strict=True):
            m.grad = gradient
            optimizer.step()
        ours.step()
    for moved, m in zip(stack.detach().reshape(6, 4, 6), alone, strict=True):
        torch.testing.assert_close(moved, m.detach(), atol=0, rtol=0)


def test_the_gradient_is_left_to_be_logged_and_zeroed():
    p = nn.Parameter(torch.randn(4, 6))
    optimizer = PerMatrix([{"params": [p]}], {p: Matrices(2, (Matrix("gate_up", 2, 6, 2, 6),))}, shampoo)
    p.grad = torch.randn(4, 6)
    kept = p.grad.clone()
    optimizer.step()
    assert torch.equal(p.grad, kept)
    assert all(m.grad is None for group in optimizer.inner.param_groups for m in group["params"])


def test_the_factor_follows_the_shapes_relative_to_the_base(make_model):
    """Width 128 on base 32, all else as at the base: fan-in x 4 halves the rate, fan-out x 4 doubles it."""
    roles = parameter_roles(make_model(width=128))
    factors = {
        name.removeprefix("blocks.1."): [lr_factor(block) for block in role.matrices.blocks]
        for name, role in roles.items()
        if role.matrices and name.startswith("blocks.1.")
    }
    assert factors == {
        "attn.q.0.weight": [0.5],
        "attn.q.2.weight": [1.0],
        "attn.kv_a.weight": [0.5, 0.5],
        "attn.kv_b.weight": [1.0, 1.0],
        "attn.out.weight": [2.0],
        "ffn.experts.gate_up": [0.5],
        "ffn.experts.down": [2.0],
        "ffn.shared.gate_up.weight": [0.5],
        "ffn.shared.down.weight": [2.0],
    }


@pytest.mark.parametrize("recipe", [SOAP, Shampoo])
def test_without_the_package_the_message_says_what_to_install(recipe, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pytorch_optimizer, .*Type: pip install 'lit-reason\[optimizers\]'"):
        recipe()


@pytest.mark.parametrize("recipe", [SOAP, Shampoo])
def test_wrong_values(recipe):
    with pytest.raises(ConfigError, match=r"optimizer\.precondition_every=0: must be at least 1"):
        recipe(precondition_every=0)
