"""silu(gate) * up by the kernels against float64, and in FP8 against the product, bit by bit."""

import pytest
import torch

pytest.importorskip("triton")
from lit_kernels.fp8 import quantise_rows_reference
from lit_kernels.swiglu import silu_mul, silu_mul_quantised, silu_mul_reference

SHAPES = [(64, 256), (33, 200), (1, 3), (40, 130)]


def problem(M, F, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(M, 2 * F, generator=generator)).to(dtype)
    return x, torch.randn(M, F, generator=generator).to(dtype)


def exact(x, grad):
    """The product and the gradient of x, in float64."""
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    product = gate * torch.sigmoid(gate) * up
    product.backward(grad.double())
    return product.detach(), wide.grad


def ours(x, grad, function=silu_mul):
    x = x.detach().requires_grad_()
    product = function(x, "triton")
    product.backward(grad)
    return product.detach(), x.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_gradient(shape):
    """In float32: exp's argument, at most 20 here, is rounded to 2**-24 of it, so that a sigmoid is off by as much as
    20 * 2**-24, and a few roundings more. In bfloat16: one rounding, 2**-8 of the result. A gradient has terms that
    cancel: the bound is on the terms, at most |grad up| or |grad gate| times 6."""
    for dtype, bound in ((torch.float32, 32 * 2.0**-24), (torch.bfloat16, 2.0**-8 + 32 * 2.0**-24)):
        x, grad = problem(*shape, dtype)
        (product, grad_x), (right, right_grad) = ours(x, grad), exact(x, grad)
        assert product.dtype == grad_x.dtype == dtype
        assert ((product - right).abs() <= bound * right.abs() + 1e-30).all()
        terms = 6 * grad.double().repeat(1, 2) * x.double().roll(shape[1], 1)
        assert ((grad_x - right_grad).abs() <= bound * right_grad.abs() + 32 * 2.0**-24 * terms.abs() + 1e-30).all()


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_is_that_of_the_rounded_product(shape, kind):
    x, _ = problem(*shape)
    found, expected = silu_mul_quantised(x, kind, "triton"), quantise_rows_reference(silu_mul(x, "triton"), kind)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales) and found.scales.stride() == expected.scales.stride()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_that_are_far_out():
    """exp overflows: the product is -0 and 0, or the gate itself."""
    gate = torch.tensor([[-200.0, -1e30, 200.0, 1e30, 0.0]])
    x = torch.cat([gate, torch.ones_like(gate)], 1)
    product, grad_x = ours(x, torch.ones_like(gate))
    assert torch.equal(product, torch.tensor([[0.0, 0.0, 200.0, 1e30, 0.0]]))
    assert torch.equal(grad_x, torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 0.0, 200.0, 1e30, 0.0]]))


def test_nothing_that_was_in_memory_comes_out(monkeypatch):
    x, grad = problem(33, 200)
    expected, q = ours(x, grad), silu_mul_quantised(x, backend="triton")
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: real(*args, **kw).fill_(float("nan")))
    for one, right in zip(ours(x, grad), expected, strict=True):
        assert torch.equal(one, right)
    for one, right in zip(silu_mul_quantised(x, backend="triton"), q, strict=True):
        assert torch.equal(one.float(), right.float())


def test_other_shapes_strides_and_nothing_at_all():
    x, grad = problem(24, 130)
    product, grad_x = ours(x, grad)
    more, grad_more = ours(x.view(2, 3, 4, 260), grad.view(2, 3, 4, 130))
    assert torch.equal(more.view(24, 130), product) and torch.equal(grad_more.view(24, 260), grad_x)
    turned = x.t().contiguous().t()
    assert torch.equal(ours(turned, grad.t().contiguous().t())[1], grad_x)
    x.requires_grad_()
    silu_mul(x, "triton").sum().backward()  # a gradient with strides of 0
    assert torch.equal(x.grad, ours(x, torch.ones_like(grad))[1])
    for shape in ((0, 8), (4, 0)):
        product, grad_x = ours(torch.empty(shape), torch.empty(shape[0], shape[1] // 2))
        assert product.shape == (shape[0], shape[1] // 2) and grad_x.shape == shape
        assert silu_mul_quantised(torch.empty(shape), backend="triton").values.shape == product.shape


def test_operations_are_registered_as_they_behave():
    x, grad = problem(9, 20, torch.float32)
    ops = torch.ops.lit_kernels
    torch.library.opcheck(ops.silu_mul.default, (x.requires_grad_(),))
    torch.library.opcheck(ops.silu_mul_backward.default, (grad, x.detach()))
    torch.library.opcheck(ops.silu_mul_quantised.default, (x.detach(), "float"))


def test_compiled_in_one_graph():
    x, grad = problem(9, 20)
    compiled = torch.compile(silu_mul, backend="aot_eager", fullgraph=True)
    for one, right in zip(ours(x, grad, compiled), ours(x, grad), strict=True):
        assert torch.equal(one, right)
    torch.testing.assert_close(ours(x, grad)[0], silu_mul_reference(x), rtol=2**-7, atol=0)
