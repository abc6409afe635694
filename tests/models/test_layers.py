"""RMSNorm's hand-written gradient, and the dtypes it takes and gives."""

import pytest
import torch

from lit_reason.models.layers import RMSNorm


def reference(x, gain, eps):
    """1910.07467 eq. 4, by autograd."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_values_and_gradients(shape):
    torch.manual_seed(0)
    module = RMSNorm(6, eps=1e-3).double()
    torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    x, target = torch.randn(2, *shape, dtype=torch.float64).requires_grad_()
    expected = reference(x, module.weight, module.eps)
    torch.testing.assert_close(module(x), expected, atol=1e-14, rtol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, atol=1e-14, rtol=1e-12)
    wanted = (x, module.weight)
    ours, theirs = (torch.autograd.grad((y * target.detach()).sum(), wanted) for y in (module(x), expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-11)


def test_bfloat16_is_normalised_in_float32():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    module = RMSNorm(64, eps=1e-6)
    out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(x.float(), module.weight, 1e-6), atol=0, rtol=2**-8)
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and module.weight.grad.dtype == torch.float32


def test_autocast_gives_its_own_dtype_with_and_without_gradients():
    x = torch.randn(5, 64)
    module = RMSNorm(64, eps=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        trained = module(x)
        with torch.no_grad():
            seen = module(x)
    assert trained.dtype == seen.dtype == torch.bfloat16 and torch.equal(trained, seen)


def test_a_gradient_with_permuted_strides():
    x = torch.randn(2, 3, 6, requires_grad=True)
    module = RMSNorm(6, eps=1e-6)
    (module(x).transpose(0, 1) * torch.ones(3, 2, 6)).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
