"""Log-probs and entropies tile by tile: against whole logits, and what they must not keep."""

import pytest
import torch
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.logprobs import TILE, linear_logprobs, linear_logprobs_reference
from torch.autograd import gradcheck


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(TILE, "cpu", (3, 4))


def inputs(M=7, V=11, D=5, dtype=torch.float64):
    """Neither M nor V is a multiple of the tile's."""
    draw = torch.Generator().manual_seed(0)
    states, weight = (2 * torch.randn(n, D, generator=draw, dtype=torch.float64) for n in (M, V))
    target = torch.randint(0, V, (M,), generator=draw)
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def weighted(outputs, weights):
    """A loss in which every row counts differently."""
    rows = torch.arange(1, len(outputs[0]) + 1).double().cos()
    return sum(w * (rows * out).sum() for w, out in zip(weights, outputs, strict=True) if w)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)])
def test_as_of_whole_logits(temperature, weights):
    found = []
    for function in (linear_logprobs, linear_logprobs_reference):
        states, weight, target = inputs()
        outputs = function(states, weight, target, temperature)
        weighted(outputs, weights).backward()
        found.append((*outputs, states.grad, weight.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_against_differences(temperature):
    states, weight, target = inputs()
    assert gradcheck(lambda x, w: linear_logprobs(x, w, target, temperature), (states, weight))


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(frozen):
    states, weight, target = inputs()
    expected = torch.autograd.grad(
        weighted(linear_logprobs_reference(states, weight, target, 1.0), (1, 1)), (states, weight)
    )
    (states if frozen == "states" else weight).requires_grad_(False)
    weighted(linear_logprobs(states, weight, target, 1.0), (1, 1)).backward()
    got, other = (weight, states) if frozen == "states" else (states, weight)
    assert other.grad is None
    torch.testing.assert_close(got.grad, expected[frozen == "states"], atol=1e-12, rtol=1e-12)


def test_logits_of_any_size():
    """The largest logit comes last, first, and far below zero; probabilities underflow."""
    states = torch.eye(3, requires_grad=True)
    weight = torch.tensor([[0.0, 900.0, -900.0]] * 4 + [[-300.0, 0.0, -1500.0]] * 4 + [[200.0, 0.0, -990.0]])
    target = torch.tensor([0, 0, 8])
    got = linear_logprobs(states, weight, target, 1.0)
    torch.testing.assert_close(got, linear_logprobs_reference(states, weight, target, 1.0), atol=1e-4, rtol=1e-5)
    sum(got).sum().backward()
    assert states.grad.isfinite().all()


def test_a_target_that_is_no_token_shows():
    states, weight, _ = inputs(M=2)
    assert linear_logprobs(states, weight, torch.tensor([-100, 11]), 1.0)[0].isnan().all()


def test_autocast_products_are_bfloat16_and_all_else_float32():
    """The error against float64 is at most that of whole bfloat16 logits, but for the order of their sums."""
    found = {}
    for name, function, dtype in (
        ("exact", linear_logprobs_reference, torch.float64),
        ("whole", linear_logprobs_reference, torch.float32),
        ("tiled", linear_logprobs, torch.float32),
    ):
        states, weight, target = inputs(M=64, V=50, D=32, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            outputs = function(states / 6, weight, target, 0.7)
        assert name == "exact" or {out.dtype for out in outputs} == {torch.float32}
        weighted(outputs, (1.0, -0.3)).backward()
        assert weight.grad.dtype == states.grad.dtype == dtype
        found[name] = (*outputs, states.grad, weight.grad)
    for exact, coarse, got in zip(*found.values(), strict=True):
        assert 0 < (got - exact).norm() < 1.2 * (coarse - exact).norm()


def test_a_bfloat16_weights_gradient_is_rounded_once():
    """683 row tiles whose shares have one sign: a running bfloat16 sum would stop growing at 256 shares."""
    states = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(6, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprobs(states, weight, torch.zeros(2048, dtype=torch.long), 1.0)[0].sum().backward()
    exact = 2048 * torch.tensor([5 / 6] + [-1 / 6] * 5)  # one-hot less p, summed over the rows
    torch.testing.assert_close(weight.grad.float().squeeze(1), exact, rtol=2**-7, atol=0)


def test_log_probs_are_never_positive():
    """Where one token has all the probability, and the normaliser is that token's logit but for its rounding."""
    states, weight, _ = inputs(M=64, V=9, D=6, dtype=torch.float32)
    target = (states @ weight.T).argmax(1)
    for temperature in (1.0, 0.1, 1e-3):
        logprob, entropy = linear_logprobs(states, weight, target, temperature)
        assert (logprob <= 0).all() and (entropy >= 0).all() and (logprob > -1e-6).any()


def test_no_rows():
    states, weight, target = inputs(M=0)
    outputs = linear_logprobs(states, weight, target)
    assert [out.shape for out in outputs] == [(0,), (0,)]
    sum(outputs).sum().backward()
    assert states.grad.shape == (0, 5) and not weight.grad.any()


def test_what_does_not_fit_is_refused():
    states, weight, target = inputs()
    with pytest.raises(ValueError, match=r"got states \(7, 5\), weight \(11, 4\), targets \(7,\); valid: \(M, D\)"):
        linear_logprobs(states, weight[:, :4], target)
    with pytest.raises(ValueError, match="targets"):
        linear_logprobs(states, weight, target[:6])
    with pytest.raises(ValueError, match=r"got a weight \(0, 5\).*at least one row"):
        linear_logprobs(states, weight[:0], target)
    with pytest.raises(ValueError, match="valid: auto, torch, triton"):
        linear_logprobs(states, weight, target, backend="cuda")
    with pytest.raises(UnsupportedError, match="Type backend='auto' or backend='torch'"):
        linear_logprobs(states, weight, target, backend="triton")
