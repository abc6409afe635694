"""Packed batches against the padded forward, which computes every prompt once per row."""

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.models import Transformer
from lit_reason.models.packing import pack

P1, P2 = [5, 6, 7], [5, 6, 8, 9, 4]  # two prompts that begin alike


def batch(rows: list[tuple[list[int], list[int]]]):
    """Right-padded inputs, and where the target is a token of the completion."""
    T = max(len(p) + len(c) for p, c in rows) - 1
    ids, counts = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(rows):
        whole = prompt + completion
        ids[b, : len(whole) - 1] = torch.tensor(whole[:-1])
        counts[b, len(prompt) - 1 : len(whole) - 1] = True
    return ids, counts


ROWS = [(P1, [1, 2, 3, 4]), (P2, [1]), (P1, [9]), (P2, [2, 2, 2, 2, 2, 2]), (P1, [1, 2])]


def test_a_shared_prompt_is_held_once_and_padding_not_at_all():
    packed = pack(*batch(ROWS))
    # Prefixes in the order of their token ids, a pad counting as -1; then each row's own tokens.
    assert packed.ids_N.tolist() == [5, 6, 7, 5, 6, 8, 9, 4, 1, 2, 3, 2, 2, 2, 2, 2, 1]
    assert packed.position_N.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5, 5, 6, 7, 8, 9, 3]
    # The token before each target, row after row: the prompt's last, then the row's own.
    assert packed.state_M.tolist() == [2, 8, 9, 10, 7, 2, 7, 11, 12, 13, 14, 15, 2, 16]


CASES = {
    "groups": ROWS,
    "one row": [(P2, [1, 2, 3])],
    "nothing shared": [([1], [2, 3]), ([2], [3]), ([3, 3], [4, 4, 4])],
    "one token each": [(P1, [1]), (P1, [2]), (P2, [3])],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [8, 12])
def test_states_and_gradients_equal_the_padded_forward(tiny, case, value):
    torch.manual_seed(0)
    model = Transformer(tiny(v_head_dim=value)).train()
    ids_BT, counts_BT = batch(CASES[case])
    if case == "groups":
        counts_BT[3, 6] = False  # a hole, as between the turns of a dialogue
    packed = pack(ids_BT, counts_BT)
    got = model.packed(packed).index_select(0, packed.state_M)
    expected = model.hidden(ids_BT).states_BTD[counts_BT]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    target = torch.randn_like(got)
    wanted = [p for n, p in model.named_parameters() if not n.startswith("head")]
    ours, theirs = (torch.autograd.grad((x * target).sum(), wanted) for x in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_long_sequences_take_the_fused_path_with_the_same_result(tiny):
    torch.manual_seed(0)
    model = Transformer(tiny(max_seq_len=640)).eval()
    ids_BT = torch.randint(0, 40, (3, 600))
    ids_BT[1:, :400] = ids_BT[0, :400]
    counts_BT = (torch.arange(600) >= 399).expand(3, -1).clone()
    counts_BT[2, 450:] = False
    packed = pack(ids_BT, counts_BT)
    assert packed.ids_N.numel() == 400 + 200 + 200 + 50
    got = model.packed(packed)[packed.state_M]
    torch.testing.assert_close(got, model.hidden(ids_BT).states_BTD[counts_BT], atol=1e-4, rtol=0)


def test_rows_without_a_target_are_left_out_and_a_batch_of_them_still_has_a_graph(tiny):
    ids_BT, counts_BT = batch(ROWS)
    without = counts_BT.clone()
    without[0] = False
    assert torch.equal(pack(ids_BT, without).ids_N, pack(ids_BT[1:], counts_BT[1:]).ids_N)
    model = Transformer(tiny()).train()
    empty = pack(ids_BT, torch.zeros_like(counts_BT))
    assert empty.state_M.numel() == 0 and empty.ids_N.tolist() == [5]
    model.packed(empty).index_select(0, empty.state_M).sum().backward()
    assert not model.embed.weight.grad.any()


def test_a_batch_longer_than_the_context_is_refused(tiny):
    ids_BT, counts_BT = batch(ROWS)
    with pytest.raises(ConfigError, match="10 tokens; the model takes 9"):
        Transformer(tiny(max_seq_len=9)).packed(pack(ids_BT, counts_BT))
