"""silu(gate) * up on a GPU: the reference's numbers, the same from run to run."""

import pytest
import torch
from lit_kernels.fp8 import quantise_rows_reference
from lit_kernels.swiglu import silu_mul, silu_mul_quantised

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SHAPES = [(4096, 18432), (4001, 2048), (1, 100)]


def problem(M, F):
    torch.manual_seed(0)
    return (torch.randn(M, n, device="cuda", dtype=torch.bfloat16) for n in (2 * F, F))


def both(x, grad, backend):
    x = x.detach().requires_grad_()
    product = silu_mul(x, backend)
    product.backward(grad)
    return product.detach(), x.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_gradient(shape):
    """Both are rounded once to bfloat16: neighbours at most, 2**-7 apart."""
    x, grad = problem(*shape)
    found = both(x, grad, "triton")
    for one, right, again in zip(found, both(x, grad, "torch"), both(x, grad, "triton"), strict=True):
        torch.testing.assert_close(one, right, rtol=2**-7, atol=1e-5)
        assert torch.equal(one, again)


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_is_that_of_the_rounded_product(shape, kind):
    x, _ = problem(*shape)
    found, expected = silu_mul_quantised(x, kind, "triton"), quantise_rows_reference(silu_mul(x, "triton"), kind)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)
