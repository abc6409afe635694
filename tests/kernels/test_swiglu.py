"""silu(gate) * up in plain torch against float64."""

import pytest
import torch
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.fp8 import quantise_rows_reference
from lit_kernels.swiglu import silu_mul, silu_mul_quantised


def test_the_first_half_is_the_gate():
    """silu(ln 3) = ln 3 * 3 / 4."""
    x = torch.tensor([[1.0986123, 0.0, 8.0, 5.0]])
    torch.testing.assert_close(silu_mul(x), torch.tensor([[1.0986123 * 0.75 * 8, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_and_gradient_are_rounded_once(dtype):
    torch.manual_seed(0)
    x, grad = (4 * torch.randn(3, 5, 40)).to(dtype).requires_grad_(), torch.randn(3, 5, 20).to(dtype)
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    exact = gate * torch.sigmoid(gate) * up
    exact.backward(grad.double())
    product = silu_mul(x)
    product.backward(grad)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(product.double(), exact, rtol=rounding + 2e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=rounding + 2e-6, atol=2e-5)


def test_fp8_is_that_of_the_rounded_product():
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, expected = silu_mul_quantised(x, "power of two"), quantise_rows_reference(silu_mul(x), "power of two")
    assert all(torch.equal(one.float(), right.float()) for one, right in zip(found, expected, strict=True))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="gate_up has 3 columns; valid: an even number"):
        silu_mul(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 3, 4\); valid: \(M, 2F\)"):
        silu_mul_quantised(torch.ones(2, 3, 4))
    with pytest.raises(UnsupportedError, match="silu_mul got backend='triton', but"):
        silu_mul(torch.ones(2, 4, device="meta"), "triton")
