"""Swaps: the same object with another forward, and back."""

import copy

import pytest
import torch
from lit_kernels.swap import ClaimedError, Swap, all_off, put, swaps_of, take_all_off, take_off
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Times(Swap):
    def forward(self, x):
        return super().forward(x) * self.swap_settings[Times]["by"]


class Plus(Swap):
    claim = "what is added"

    def forward(self, x):
        return super().forward(x) + self.swap_settings[Plus]["one"]


class Outer(Swap):
    claim = "the outside"
    outermost = True

    def forward(self, x):
        return -super().forward(x)


@pytest.fixture
def layer():
    return nn.Linear(2, 2).double()


X = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


def test_the_object_and_what_belongs_to_it_stay(layer):
    plain, keys, weight, hooked = layer(X), list(layer.state_dict()), layer.weight, []
    layer.register_forward_hook(lambda *_: hooked.append(1))
    put(layer, Times, by=3)
    assert torch.equal(layer(X), 3 * plain) and hooked == [1]
    assert layer.weight is weight and list(layer.state_dict()) == keys and isinstance(layer, nn.Linear)
    assert take_off(layer, Times) and type(layer) is nn.Linear and torch.equal(layer(X), plain)
    assert "swap_settings" not in vars(layer) and not take_off(layer, Times)


def test_the_order_and_one_taken_from_below(layer):
    plain = layer(X)
    put(layer, Times, by=3)
    put(layer, Plus, one=1)
    assert list(swaps_of(layer)) == [Plus, Times] and torch.equal(layer(X), 3 * plain + 1)
    assert take_off(layer, Times) and torch.equal(layer(X), plain + 1)
    put(layer, Outer)
    put(layer, Times, by=2)
    assert list(swaps_of(layer)) == [Outer, Times, Plus] and torch.equal(layer(X), -2 * (plain + 1))
    take_all_off(layer)
    assert type(layer) is nn.Linear


def test_off_for_a_while(layer):
    plain = layer(X)
    put(layer, Times, by=3)
    put(layer, Plus, one=1)
    with pytest.raises(RuntimeError, match="on purpose"), all_off(layer):
        assert type(layer) is nn.Linear and torch.equal(layer(X), plain)
        raise RuntimeError("on purpose")
    assert list(swaps_of(layer)) == [Plus, Times] and torch.equal(layer(X), 3 * plain + 1)


def test_a_copy_is_swapped_by_itself(layer):
    plain = layer(X)
    put(layer, Times, by=3)
    other = copy.deepcopy(layer)
    take_off(layer, Times)
    assert torch.equal(other(X), 3 * plain) and torch.equal(layer(X), plain)


def test_two_claims_on_one_module_are_an_error(layer):
    put(layer, Times, by=3)
    with pytest.raises(
        ClaimedError, match=r"model\.head: Times wants to replace what it computes.*Drop one of the two"
    ):
        put(layer, Times, "model.head", by=4)
    assert layer.swap_settings[Times] == {"by": 3}


def test_another_class_on_top_is_left_there(layer):
    """As FSDP2's `fully_shard` does it."""
    put(layer, Times, by=3)
    swapped = type(layer)
    layer.__class__ = type("FSDP" + swapped.__name__, (FSDPModule, swapped), {})
    assert list(swaps_of(layer)) == [Times] and not take_off(layer, Times)
    layer.__class__ = swapped
    assert take_off(layer, Times)
