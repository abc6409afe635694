"""RMSNorm by the kernels against float64, and in FP8 against the result, bit by bit."""

import pytest
import torch

pytest.importorskip("triton")
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.fp8 import quantise_rows_reference
from lit_kernels.gpu import rms_norm as kernels
from lit_kernels.rms_norm import WIDEST, rms_norm, rms_norm_quantised

SHAPES = [(40, 256), (7, 200), (1, 3), (3, 2500), (2, 5000)]
EPS = 1e-5


def problem(M, D, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, D, generator=generator) * torch.exp(2 * torch.randn(M, 1, generator=generator))
    gain, grad = 1 + torch.randn(D, generator=generator) / 4, torch.randn(M, D, generator=generator)
    return x.to(dtype), gain, grad.to(dtype)


def exact(x, gain, grad):
    x, gain = (one.double().requires_grad_() for one in (x, gain))
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain
    y.backward(grad.double())
    return y.detach(), x.grad, gain.grad


def ours(x, gain, grad, function=rms_norm):
    x, gain = (one.detach().requires_grad_() for one in (x, gain))
    y = function(x, gain, EPS, "triton")
    y.backward(grad)
    return y.detach(), x.grad, gain.grad


def error(found, right):
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(shape):
    """Sums of D in float32, and in bfloat16 one rounding, 2**-8 of a number at most; the gain's gradient has none."""
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        inputs = problem(*shape, dtype)
        (y, grad_x, grad_gain), (right, right_x, right_gain) = ours(*inputs), exact(*inputs)
        assert y.dtype == grad_x.dtype == dtype and grad_gain.dtype == torch.float32
        assert error(y, right) < bound and error(grad_x, right_x) < bound and error(grad_gain, right_gain) < 1e-6
        assert ((y - right).abs() <= (bound + 1e-6) * right.abs()).all()


def test_a_program_takes_many_tiles_and_none_twice(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    inputs = problem(7 * 16 + 5, 100, torch.float32)  # eight tiles of 16 rows, the last one short
    for found, right in zip(ours(*inputs), exact(*inputs), strict=True):
        assert error(found, right) < 1e-6


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_is_that_of_the_rounded_result(shape, kind):
    x, gain, _ = problem(*shape)
    found = rms_norm_quantised(x, gain, EPS, kind, "triton")
    expected = quantise_rows_reference(rms_norm(x, gain, EPS, "triton"), kind)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales) and found.scales.stride() == expected.scales.stride()


def test_nothing_that_was_in_memory_comes_out(monkeypatch):
    x, gain, grad = problem(35, 200)
    expected, q = ours(x, gain, grad), rms_norm_quantised(x, gain, EPS, backend="triton")
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: real(*args, **kw).fill_(float("nan")))
    for one, right in zip(ours(x, gain, grad), expected, strict=True):
        assert torch.equal(one, right)
    for one, right in zip(rms_norm_quantised(x, gain, EPS, backend="triton"), q, strict=True):
        assert torch.equal(one.float(), right.float())


def test_other_shapes_and_rows_of_zeros_and_none_at_all():
    x, gain, grad = problem(24, 130)
    x[5] = 0
    y, grad_x, _ = ours(x, gain, grad)
    assert (y[5] == 0).all()
    expected = grad[5].double() * gain.double() / EPS**0.5  # the norm of a row of zeros is x / sqrt(eps)
    assert ((grad_x[5] - expected).abs() <= (2.0**-8 + 1e-6) * expected.abs()).all()
    more = ours(x.view(2, 3, 4, 130), gain, grad.view(2, 3, 4, 130))
    assert torch.equal(more[0].view(24, 130), y) and torch.equal(more[1].view(24, 130), grad_x)
    assert torch.equal(ours(x.t().contiguous().t(), gain, grad.t().contiguous().t())[1], grad_x)
    y, grad_x, grad_gain = ours(x[:0], gain, grad[:0])
    assert y.shape == grad_x.shape == (0, 130) and (grad_gain == 0).all()
    assert rms_norm_quantised(x[:0], gain, backend="triton").scales.shape == (0, 2)


def test_a_row_too_wide_for_registers_is_refused():
    x, gain = torch.zeros(1, WIDEST + 1), torch.ones(WIDEST + 1)
    with pytest.raises(UnsupportedError, match=r"D=8193; valid for Triton: up to 8192\. Type backend='auto'"):
        rms_norm(x, gain, backend="triton")
    assert rms_norm(x, gain).shape == x.shape


def test_operations_are_registered_as_they_behave():
    x, gain, grad = problem(9, 20, torch.float32)
    ops = torch.ops.lit_kernels
    torch.library.opcheck(ops.rms_norm.default, (x.clone().requires_grad_(), gain.clone().requires_grad_(), EPS))
    torch.library.opcheck(ops.rms_norm_backward.default, (grad, x, gain, EPS))
    torch.library.opcheck(ops.rms_norm_quantised.default, (x, gain, EPS, "float"))


def test_compiled_in_one_graph():
    inputs = problem(9, 20)
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)
    for one, right in zip(ours(*inputs, compiled), ours(*inputs), strict=True):
        assert torch.equal(one, right)
