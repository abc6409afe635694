"""RMSNorm in plain torch against float64."""

import pytest
import torch
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.fp8 import quantise_rows_reference
from lit_kernels.rms_norm import rms_norm, rms_norm_quantised


def test_by_hand():
    """mean(3^2, 4^2) = 12.5, and 12.5 + 3.5 = 4^2."""
    found = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 10.0]), 3.5)
    torch.testing.assert_close(found, torch.tensor([1.5, 10.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_and_gradients_are_rounded_once(dtype):
    torch.manual_seed(0)
    x, gain, grad = torch.randn(3, 5, 40).to(dtype), 1 + torch.randn(40) / 4, torch.randn(3, 5, 40).to(dtype)
    wide, wide_gain = x.double().requires_grad_(), gain.double().requires_grad_()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * wide_gain
    exact.backward(grad.double())
    x.requires_grad_()
    gain.requires_grad_()
    found = rms_norm(x, gain, 1e-5)
    found.backward(grad)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=rounding + 2e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=rounding + 2e-6, atol=2e-6)
    torch.testing.assert_close(gain.grad.double(), wide_gain.grad, rtol=2e-6, atol=1e-5)


def test_fp8_is_that_of_the_rounded_result():
    x, gain = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.full((300,), 1.1)
    found = rms_norm_quantised(x, gain, 1e-5, "power of two")
    expected = quantise_rows_reference(rms_norm(x, gain, 1e-5), "power of two")
    assert all(torch.equal(one.float(), right.float()) for one, right in zip(found, expected, strict=True))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"the gain has shape \(3,\) and x \(2, 4\); valid: \(4,\)"):
        rms_norm(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4\); valid: \(M, D\)"):
        rms_norm_quantised(torch.ones(2, 3, 4), torch.ones(4))
    with pytest.raises(UnsupportedError, match="rms_norm got backend='triton', but"):
        rms_norm(torch.ones(2, 4, device="meta"), torch.ones(4, device="meta"), backend="triton")
