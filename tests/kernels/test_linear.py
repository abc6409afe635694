"""The FP8 linear layer, emulated, against float64; its dtypes, sizes, and what it keeps for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.fp8 import (
    dequantise_blocks,
    dequantise_rows,
    quantise_blocks_reference,
    quantise_rows_reference,
)
from lit_kernels.linear import fp8_linear, unsupported


def problem(M=192, N=128, K=256, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, w, b, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((M, K), (N, K), (N,), (M, N)))
    return [one.requires_grad_() for one in (x, w, b)], grad


def gradients(linear, inputs, grad):
    inputs = [one.detach().requires_grad_(one.requires_grad) for one in inputs]
    y = linear(*inputs)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(one.grad for one in inputs)]


def emulated(**settings):
    return lambda x, w, b=None: fp8_linear(x, w, b, backend="emulate", **settings)


def sqnr_db(found, exact):
    return float(10 * torch.log10(exact.square().sum() / (exact - found.double()).square().sum()))


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("M", [192, 131])
def test_all_products_are_28_db_over_their_error(kind, M):
    (x, w, _), grad = problem(M)
    exact = gradients(F.linear, [x.double(), w.double()], grad.double())
    for found, right in zip(gradients(emulated(kind=kind), [x, w], grad), exact, strict=True):
        assert sqnr_db(found, right) >= 28


def test_products_are_of_what_the_recipe_quantises():
    """To float32's rounding: rows of x and dy and blocks of w, but along the tokens for dw."""
    (x, w, b), grad = problem(130)
    y, grad_x, grad_w, grad_b = gradients(emulated(), [x, w, b], grad)

    def rows(one):
        return dequantise_rows(quantise_rows_reference(one.detach())).double()

    blocks = dequantise_blocks(quantise_blocks_reference(w.detach())).double()
    for found, right in (
        (y, rows(x) @ blocks.t() + b.detach().double()),
        (grad_x, rows(grad) @ blocks),
        (grad_w, rows(grad.t()) @ rows(x.t()).t()),
        (grad_b, grad.double().sum(0)),
    ):
        assert float((found - right).norm() / right.norm()) < 1e-6


def test_dtypes():
    (x, w, b), grad = problem()
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = gradients(emulated(), [x, w, b], grad)
    assert y.dtype == torch.bfloat16 and {g.dtype for g in grads} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert emulated(dtype=torch.float32)(x, w).dtype == torch.float32
    y, grad_x, grad_w, _ = gradients(emulated(), [x.bfloat16(), w, b], grad)
    assert (y.dtype, grad_x.dtype, grad_w.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert not torch.equal(grad_w, grad_w.bfloat16().float())  # rounded to the weight's dtype alone


@pytest.mark.parametrize("shape", [(2, 3), (0,), (), (2, 0, 5)], ids=str)
def test_any_number_of_tokens(shape):
    (_, w, b), _ = problem(N=32, K=48)
    x = torch.randn(*shape, 48, requires_grad=True)
    y = emulated()(x, w, b)
    y.sum().backward()
    assert y.shape == (*shape, 32) and x.grad is not None and x.grad.shape == x.shape and w.grad is not None
    if 0 in shape:
        assert (w.grad == 0).all()
    else:
        torch.testing.assert_close(y, F.linear(x, w, b), rtol=0.1, atol=1.0)


def kept(linear, *inputs):
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: tensors.append(one) or one, lambda one: one):
        linear(*inputs)
    return tensors


def test_what_is_kept_is_a_byte_per_number_and_the_weight():
    (x, w, _), _ = problem(M=256)
    own = [one for one in kept(emulated(), x, w) if one.data_ptr() != w.data_ptr()]
    assert sum(one.numel() * one.element_size() for one in own) == 256 * 256 + 256 * 256 // 128 * 4
    w.requires_grad_(False)
    assert all(one.data_ptr() == w.data_ptr() for one in kept(emulated(), x, w))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["input", "weight"])
def test_only_the_gradient_that_is_needed(needs):
    (x, w, _), grad = problem()
    every = gradients(emulated(), [x, w], grad)
    for one, need in zip((x, w), needs, strict=True):
        one.requires_grad_(need)
    for found, expected, need in zip(gradients(emulated(), [x, w], grad)[1:], every[1:], needs, strict=True):
        assert torch.equal(found, expected) if need else found is None


def test_compiled_in_one_graph():
    (x, w, b), grad = problem(130, 32, 48)
    compiled = torch.compile(emulated(), backend="aot_eager", fullgraph=True)
    for found, expected in zip(
        gradients(compiled, [x, w, b], grad), gradients(emulated(), [x, w, b], grad), strict=True
    ):
        assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused():
    assert unsupported(32, 48) == "" and "33 x 48 is no multiple of 16" in unsupported(33, 48)
    assert unsupported(32, 40) and unsupported(0, 16)
    (x, w, _), _ = problem(N=33, K=48)
    with pytest.raises(ValueError, match=r"33 x 48 is no multiple of 16.*Type torch\.nn\.functional\.linear"):
        emulated()(x, w)
    with pytest.raises(ValueError, match=r"got x \(192, 48\) and a weight \(32, 64\); valid: \(\.\.\., 64\)"):
        emulated()(x, torch.zeros(32, 64))
    with pytest.raises(UnsupportedError, match="Type backend='emulate'"):
        fp8_linear(torch.zeros(16, 64), torch.zeros(32, 64))


def test_gradients_of_gradients_are_refused():
    (x, w, _), grad = problem(16, 16, 16)
    (grad_x,) = torch.autograd.grad(emulated()(x, w), x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()
