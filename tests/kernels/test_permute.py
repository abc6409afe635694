"""Tokens to their experts and back in plain torch, against loops."""

import pytest
import torch
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.fp8 import dequantise_rows, quantise_rows_reference
from lit_kernels.permute import permute, permute_quantised, unpermute


def test_by_hand():
    x = torch.tensor([[1.0], [2.0], [3.0]])
    rows, ends, place = permute(x, torch.tensor([[1, 0], [2, 3], [0, -1]]), 3)  # 3 and -1 are nobody's
    assert rows.flatten().tolist() == [1, 3, 1, 2, 0, 0]
    assert ends.tolist() == [2, 3, 4] and ends.dtype == torch.int32
    assert place.tolist() == [[2, 0], [3, -1], [1, -1]]
    back = unpermute(rows, place, torch.tensor([[0.5, 2.0], [1.0, 9.0], [3.0, 9.0]]))
    assert back.flatten().tolist() == [2.5, 2.0, 9.0]


def problem():
    torch.manual_seed(0)
    N, K, E, D = 50, 3, 6, 8
    experts = torch.randint(-1, E + 1, (N, K))
    experts[experts == 2] = 4  # an expert with nothing
    return torch.randn(N, D), experts, torch.rand(N, K), E


def test_rows_are_each_experts_tokens_in_their_order():
    x, experts, _, E = problem()
    rows, ends, place = permute(x, experts, E)
    start = 0
    for e, end in enumerate(ends.tolist()):
        token, k = torch.where(experts == e)
        assert torch.equal(rows[start:end], x[token]) and torch.equal(place[token, k].sort().values, place[token, k])
        assert torch.equal(place[token, k], torch.arange(start, end))
        start = end
    assert (rows[start:] == 0).all() and (place[(experts < 0) | (experts >= E)] == -1).all() and start < len(rows)


def test_there_and_back_and_all_gradients():
    """With f(row) = row, the result is x times the sum of the weights of the choices that count."""
    x, experts, weights, E = problem()
    x.requires_grad_()
    weights.requires_grad_()
    rows, _, place = permute(x, experts, E)
    rows.retain_grad()
    grad = torch.randn(x.shape)
    unpermute(rows, place, weights).backward(grad)
    counts = (experts >= 0) & (experts < E)
    total = (weights * counts).sum(1, keepdim=True).detach()
    torch.testing.assert_close(unpermute(rows, place, weights), x * total)
    torch.testing.assert_close(x.grad, grad * total)
    torch.testing.assert_close(weights.grad, (grad * x.detach()).sum(1, keepdim=True) * counts)
    assert (rows.grad[counts.sum() :] == 0).all() and rows.grad[: counts.sum()].abs().sum() > 0


def test_a_row_of_nobody_is_not_read():
    place, weights = torch.tensor([[0, -1], [1, -1]]), torch.ones(2, 2)
    rows = torch.tensor([[1.0], [float("nan")], [float("nan")]])
    assert unpermute(rows, place, weights)[0] == 1
    assert unpermute(rows.flip(0), torch.tensor([[2, -1]]), weights[:1]).item() == 1


def test_sums_are_in_float32_and_rounded_once():
    """256 + 1 is 256 in bfloat16, 256 + 1 + 1 = 258."""
    rows, place = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16(), torch.tensor([[0, 1, 2]])
    assert unpermute(rows, place, torch.ones(1, 3)).item() == 258
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permute(x, place, 3).rows_SD.backward(rows)
    assert x.grad is not None and x.grad.item() == 258


def test_fp8_is_that_of_the_permuted_rows():
    x, experts, _, E = problem()
    found, rows = permute_quantised(x.bfloat16(), experts, E).rows, permute(x.bfloat16(), experts, E).rows_SD
    expected = quantise_rows_reference(rows)
    assert all(torch.equal(one.float(), right.float()) for one, right in zip(found, expected, strict=True))
    assert (dequantise_rows(found) - rows.float()).abs().max() < 2**-4 * rows.abs().max()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"x is \(2, 4\), experts \(3, 1\); valid: \(N, D\) and \(N, K\)"):
        permute(torch.ones(2, 4), torch.zeros(3, 1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"place is \(1, 2\), weights \(1, 3\); valid"):
        unpermute(torch.ones(2, 4), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 3))
    with pytest.raises(UnsupportedError, match="permute got backend='triton', but"):
        permute(torch.ones(2, 4, device="meta"), torch.zeros(2, 1, dtype=torch.int64, device="meta"), 2, "triton")
