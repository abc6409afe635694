"""From records to tensors, by hand."""

import functools
import operator

import pytest
import torch

from lit_reason.errors import RolloutError
from lit_reason.loop.batching import collate, minibatches, split
from lit_reason.types import Completion, Prompt


def test_collate_aligns_everything_with_the_targets():
    prompts = [Prompt("a", "", "", "", (1, 2)), Prompt("b", "", "", "", (3,))]
    completions = [
        Completion("a", 0, (10, 11, 12), (-1.0, -2.0, -3.0), "", "stop", 0, 0),
        Completion("b", 0, (20,), (-4.0,), "", "length", 0, 0),
    ]
    batch = collate(prompts, completions, max_completion=8, pad_id=99)
    assert batch.input_ids_BT.tolist() == [[1, 2, 10, 11], [3, 20, 99, 99]]
    assert batch.target_ids_BT.tolist() == [[2, 10, 11, 12], [20, 99, 99, 99]]
    assert batch.mask_BT.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.rollout_logprobs_BT.tolist() == [[0, -1, -2, -3], [-4, 0, 0, 0]]
    assert (batch.sequences_total, batch.tokens_total, batch.prompts_total, batch.max_completion) == (2, 4, 2, 8)


def test_minibatches_deal_every_group_once_and_whole():
    steps = minibatches(groups=6, group_size=3, count=2, seed=4)
    assert [len(s) for s in steps] == [9, 9] and sorted(functools.reduce(operator.iadd, steps, [])) == list(range(18))
    for step in steps:
        assert all(step[i : i + 3] == [step[i], step[i] + 1, step[i] + 2] and step[i] % 3 == 0 for i in (0, 3, 6))
    assert minibatches(6, 3, 2, seed=4) == steps != minibatches(6, 3, 2, seed=5)


def test_split_keeps_groups_together_in_order_of_length_and_trims_padding():
    prompts = [Prompt(str(i), "", "", "", (7,)) for i in range(4)]
    lengths = [6, 1, 5, 2]
    completions = [Completion(str(i), 0, tuple(range(n)), (-1.0,) * n, "", "stop", 0, 0) for i, n in enumerate(lengths)]
    batch = collate(prompts, completions, 6, 0)
    short, long = split(batch, range(4), torch.tensor([0, 1, 0, 1]), micro_batches=2)  # group 1 has lengths 1 and 2
    assert short.mask_BT.tolist() == [[1, 0], [1, 1]] and short.input_ids_BT.shape == (2, 2)
    assert long.mask_BT.sum(1).tolist() == [6, 5] and long.input_ids_BT.shape == (2, 6)
    assert short.group_tokens_B.tolist() == [3, 3] and long.group_tokens_B.tolist() == [11, 11]
    for part in (short, long):
        assert (part.sequences_total, part.tokens_total, part.prompts_total) == (4, 14, 2)


def told(prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Experts that name the token that they were chosen for: (S, 2 layers, 2)."""
    read = torch.tensor((prompt + completion)[:-1], dtype=torch.int16)
    return read[:, None, None] + torch.tensor([[0, 100], [200, 300]], dtype=torch.int16)


def told_completion(prompt: Prompt, ids: tuple[int, ...], tells: bool = True) -> Completion:
    experts = told(prompt.token_ids, ids) if tells else None
    return Completion(prompt.id, 0, ids, (-1.0,) * len(ids), "", "stop", 0, 0, experts_SLK=experts)


def test_experts_lie_beside_the_tokens_that_were_read_and_are_cut_with_them():
    prompts = [Prompt(str(i), "", "", "", (7, 8)[: 1 + i % 2]) for i in range(4)]
    completions = [
        told_completion(p, tuple(range(10, 10 + n)), n != 2) for p, n in zip(prompts, (6, 1, 5, 2), strict=True)
    ]
    batch = collate(prompts, completions, 6, pad_id=0)
    assert batch.experts_BTLK.dtype == torch.int16 and batch.experts_BTLK.shape == (4, 6, 2, 2)
    # What the engine read: all but the last token. Row 3's engine told nothing.
    assert batch.experts_BTLK[:, :, 0, 0].tolist() == [
        [7, 10, 11, 12, 13, 14], [7, 8, -1, -1, -1, -1], [7, 10, 11, 12, 13, -1], [-1] * 6,
    ]  # fmt: skip
    for part, T in zip(split(batch, range(4), torch.tensor([0, 1, 0, 1]), micro_batches=2), (3, 6), strict=True):
        assert part.experts_BTLK.shape == (2, T, 2, 2) and part.input_ids_BT.shape == (2, T)
        known = part.experts_BTLK[:, :, 0, 0] >= 0
        for (layer, k), shift in {(0, 0): 0, (0, 1): 100, (1, 0): 200, (1, 1): 300}.items():
            assert torch.equal(part.experts_BTLK[:, :, layer, k][known], part.input_ids_BT[known] + shift)
            assert (part.experts_BTLK[:, :, layer, k][~known] == -1).all()
    assert collate(prompts[3:], completions[3:], 6, 0).experts_BTLK is None


def test_experts_that_cannot_be_the_completions_are_refused():
    prompt = Prompt("a", "", "", "", (1, 2))
    good = told_completion(prompt, (3, 4))
    for wrong in (good.experts_SLK[:-1], good.experts_SLK[:, :1], told((1, 2), (3, 4, 5))):
        other = Completion("a", 1, (3, 4), (-1.0, -1.0), "", "stop", 0, 0, experts_SLK=wrong)
        with pytest.raises(RolloutError, match=r"prompt a, sample 1, have shape .*; expected \(3, 2, 2\)"):
            collate([prompt] * 2, [good, other], 8, 0)
    zeros = Completion("a", 2, (3, 4), (-1.0, -1.0), "", "stop", 0, 0, experts_SLK=torch.zeros_like(good.experts_SLK))
    with pytest.raises(RolloutError, match="sample 2, name one twice"):
        collate([prompt], [zeros], 8, 0)
    unknown = Completion("a", 3, (3, 4), (-1.0, -1.0), "", "stop", 0, 0, experts_SLK=-torch.ones_like(good.experts_SLK))
    assert (collate([prompt], [unknown], 8, 0).experts_BTLK == -1).all()
