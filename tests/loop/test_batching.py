"""From records to tensors, by hand."""

import functools
import operator

import torch

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
