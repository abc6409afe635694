"""The FP8 linear layer by the kernels against itself emulated."""

import pytest
import torch

pytest.importorskip("triton")
from lit_kernels import linear
from lit_kernels.linear import fp8_linear


def problem(M, N=144, K=160, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x, w, b, grad = (torch.randn(s, generator=generator).to(dtype) for s in ((M, K), (N, K), (N,), (M, N)))
    return [one.requires_grad_() for one in (x, w, b)], grad


def gradients(inputs, grad, linear=fp8_linear, **settings):
    inputs = [one.detach().requires_grad_() for one in inputs]
    y = linear(*inputs, **settings)
    y.backward(grad)
    return [y.detach(), *(one.grad for one in inputs)]


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("M", [160, 131, 1, 0])
def test_equals_the_emulated_layer(M, kind):
    """The same bits are multiplied, so that only the order of float32 sums differs, and the rounding to bfloat16."""
    inputs, grad = problem(M)
    found = gradients(inputs, grad, backend="triton", kind=kind)
    expected = gradients(inputs, grad, backend="emulate", kind=kind)
    for one, right in zip(found, expected, strict=True):
        assert one.dtype == right.dtype == torch.bfloat16
        torch.testing.assert_close(one, right, rtol=2**-7, atol=1e-4)


def test_what_no_kernel_wrote_does_not_come_out(monkeypatch):
    inputs, grad = problem(131)
    expected = gradients(inputs, grad, backend="triton")
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: real(*args, **kw).fill_(float("nan")))
    for one, right in zip(gradients(inputs, grad, backend="triton"), expected, strict=True):
        assert torch.equal(one, right)


def test_compiled_in_one_graph():
    inputs, grad = problem(48, 32, 48)
    compiled = torch.compile(fp8_linear, backend="aot_eager", fullgraph=True)
    found = gradients(inputs, grad, compiled, backend="triton")
    for one, right in zip(found, gradients(inputs, grad, backend="triton"), strict=True):
        assert torch.equal(one, right)


def test_tma_and_cublas_can_address_every_operand(monkeypatch):
    """Rows of a multiple of 16 bytes, also where they are as long as there are tokens."""
    real, lengths = linear.gemm, []

    def recorded(a, b, *arguments):
        lengths.extend((a.values.shape[1], b.values.shape[1]))
        return real(a, b, *arguments)

    monkeypatch.setattr(linear, "gemm", recorded)
    gradients(*problem(131), backend="triton")
    assert lengths == [160, 160, 144, 144, 144, 144]  # K, N, and 131 tokens in 144
