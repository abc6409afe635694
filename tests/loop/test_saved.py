"""A round that waits for its training, in a file and back."""

import io
import math
from dataclasses import fields, replace

import pytest
import torch

from lit_reason.loop.collect import Rollout
from lit_reason.loop.saved import pack_rollout, unpack_rollout
from lit_reason.types import Completion, Prompt, RewardState, RolloutGroup, Scores


def assert_equal(a, b) -> None:
    """Field by field; tensors bit for bit, NaN included."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))
    elif hasattr(a, "__dataclass_fields__"):
        for field in fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def completion(i: int, **more) -> Completion:
    n = 2 + i % 3
    logprobs = tuple(-math.pi * (t + 1) / (i + 1) for t in range(n))  # no float32 holds these
    return Completion("p", i, tuple(range(i, i + n)), logprobs, f"text {i}", "stop", 3, 2**63 - 1 - i, **more)


def scores(rows: int) -> Scores:
    values_BR, states_BR = torch.rand(rows, 2), torch.zeros(rows, 2, dtype=torch.int64)
    values_BR[0, 1], states_BR[0, 1] = float("nan"), RewardState.TIMEOUT
    return Scores(("a", "b"), torch.tensor([1.0, 0.5]), values_BR, states_BR, {(0, "b"): "too slow"})


def there_and_back(rollout: Rollout) -> Rollout:
    file = io.BytesIO()
    torch.save(pack_rollout(rollout), file)
    file.seek(0)
    return unpack_rollout(torch.load(file, weights_only=True))


@pytest.mark.parametrize("greedy", [False, True])
def test_every_field_comes_back(greedy):
    """Two of three groups are kept, in another order; completions with and without what engines may tell."""
    experts = torch.arange(24, dtype=torch.int16).view(4, 3, 2)
    rows = [
        completion(0),
        completion(1, mask=(1, 0, 1), experts_SLK=experts),
        completion(2, mask=(0, 1, 1, 1), switches=((1, 4), (2, 5))),
        completion(3, experts_SLK=experts + 1),
        completion(4),
        replace(completion(5), finish_reason="length"),
    ]
    prompts = [Prompt(f"{g}", f"q{g}", "7", "test", (g, g + 1), {"level": g, "of": {"x": [1, 2]}}) for g in range(3)]
    groups = [
        RolloutGroup(p, rows[2 * g : 2 * g + 2], scores(2), scores(1) if greedy else None)
        for g, p in enumerate(prompts)
    ]
    rollout = Rollout(5, [groups[2], groups[0]], 1, groups, {"generate": 1.25, "score": 0.5})
    back = there_and_back(rollout)
    assert_equal(back, rollout)
    assert back.groups[0] is back.generated[2], "one group stays one"
    assert back.age == rollout.age == 2


def test_the_long_fields_are_one_tensor_each_for_the_whole_round():
    """Thousands of completions: a file entry for each would take longer than the round's training."""
    group = RolloutGroup(Prompt("p", "q", "", "test", (1,)), [completion(i) for i in range(300)], scores(300))
    packed = pack_rollout(Rollout(0, [group], 0, [group]))["completions"]
    values, lengths = packed["token_ids"]
    assert len(lengths) == 300 and len(values) == sum(2 + i % 3 for i in range(300)) == lengths.sum()
    assert packed["logprobs"][0].dtype == torch.float64
