"""How rows are dealt to experts on a CPU; what they give is in test_grouped.py."""

import pytest
import torch
from lit_kernels.grouped import experts_reference
from lit_kernels.one_by_one import _deal, experts
from lit_kernels.sizes import round_up


def test_sizes_are_few_and_hardly_larger():
    """Eight an octave: 16 at least, 1/8 more at most where that is more than 16."""
    assert [round_up(n) for n in (1, 16, 17, 128, 129, 511, 512, 513, 1025)] == [
        16, 16, 32, 128, 144, 512, 512, 576, 1152,
    ]  # fmt: skip
    assert all(n <= round_up(n) <= n + max(16, n / 8) for n in range(1, 5000))
    assert len({round_up(n) for n in range(512, 4097)}) == 3 * 8 + 1


def test_rows_of_an_expert_are_padded_with_its_last():
    """Expert 1 is chosen by tokens 0 and 2 (choices 0 and 5), expert 0 by tokens 1 and 2, expert 2 by nobody; choices 1
    and 2 are of no expert."""
    rows = _deal(torch.tensor([[1, 3], [-1, 0], [0, 1]]), 3, compiled=True)
    assert rows.slices == [(0, slice(0, 16)), (1, slice(16, 32))]
    assert rows.choice_P.tolist() == [3] + 15 * [4] + [0] + 15 * [5]
    assert rows.pads_P.tolist() == 2 * (2 * [False] + 14 * [True])
    assert rows.place_NK.tolist() == [[16, 32], [32, 0], [1, 17]]


def test_float32_needs_no_padding():
    rows = _deal(torch.tensor([[1], [0], [1]]), 3, compiled=False)
    assert rows.slices == [(0, slice(0, 1)), (1, slice(1, 3))]
    assert rows.place_NK.tolist() == [[1], [0], [2]]


@pytest.mark.parametrize("poisoned", [None, 0])
def test_what_pads_adds_nothing(poisoned):
    """In bfloat16, where experts are padded, against float64. A NaN stays in its token and its own experts: rows that
    pad read it again, with a weight of zero."""
    E, N, K, D, F_ = 4, 40, 2, 16, 8
    torch.manual_seed(0)
    leaves = [
        t.bfloat16() for t in (torch.randn(N, D), torch.rand(N, K), torch.randn(E, 2 * F_, D), torch.randn(E, D, F_))
    ]
    chosen = torch.randn(N, 3).topk(K).indices  # the last expert has no rows
    if poisoned is not None:
        leaves[0][poisoned], chosen[poisoned] = float("nan"), torch.tensor([0, 2])
        chosen[1:] = chosen[1:].where(chosen[1:] != 0, -1)  # expert 0 has this token alone
    ours, wide = (
        [one.detach().to(dtype).requires_grad_() for one in leaves] for dtype in (torch.bfloat16, torch.float64)
    )
    gradient = torch.randn(N, D)
    found, right = experts(ours[0], chosen, *ours[1:]), experts_reference(wide[0], chosen, *wide[1:])
    found.backward(gradient.bfloat16())
    right.backward(gradient.bfloat16().double())
    for one, exact in ((found, right), *((a.grad, b.grad) for a, b in zip(ours, wide, strict=True))):
        assert one is not None and exact is not None and bool(exact.isfinite().any())
        torch.testing.assert_close(
            one.double(), exact, rtol=2e-2, atol=5e-2 * exact.nan_to_num().abs().max().item(), equal_nan=True
        )
    assert ours[2].grad is not None and (ours[2].grad[3] == 0).all()


@pytest.mark.parametrize("chosen", [torch.empty(0, 2).long(), torch.full((3, 2), -1)], ids=["no tokens", "all dropped"])
def test_nothing_to_do(chosen):
    x = torch.ones(len(chosen), 8).bfloat16().requires_grad_()
    gate_up, down = torch.ones(3, 8, 8).bfloat16().requires_grad_(), torch.ones(3, 8, 4).bfloat16()
    out = experts(x, chosen, torch.ones(chosen.shape).bfloat16(), gate_up, down)
    out.sum().backward()
    assert out.shape == x.shape and (out == 0).all()
    assert x.grad is not None and gate_up.grad is not None and (x.grad == 0).all() and (gate_up.grad == 0).all()


def test_choices_may_lie_column_by_column():
    torch.manual_seed(1)
    inputs = torch.randn(6, 8), torch.rand(6, 2), torch.randn(3, 8, 8), torch.randn(3, 8, 4)
    chosen = torch.randn(6, 3).topk(2).indices
    right = experts(inputs[0], chosen, *inputs[1:])
    assert torch.equal(experts(inputs[0], chosen.t().contiguous().t(), *inputs[1:]), right)
