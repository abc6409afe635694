"""RMSNorm on a GPU: the reference's numbers, the same from run to run."""

import pytest
import torch
from lit_kernels.fp8 import dequantise_rows
from lit_kernels.rms_norm import rms_norm, rms_norm_quantised

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SHAPES = [(8192, 7168), (65536, 128), (1001, 2100), (1, 8192)]


def problem(M, D):
    torch.manual_seed(0)
    x, grad = (torch.randn(M, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return x, 1 + torch.randn(D, device="cuda") / 4, grad


def every(x, gain, grad, backend):
    x, gain = (one.detach().requires_grad_() for one in (x, gain))
    y = rms_norm(x, gain, 1e-6, backend)
    y.backward(grad)
    return y.detach(), x.grad, gain.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients(shape):
    """Two are rounded once to bfloat16: neighbours at most, 2**-7 apart; the gain's gradient is a float32 sum."""
    inputs = problem(*shape)
    found, again, expected = (every(*inputs, backend) for backend in ("triton", "triton", "torch"))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for one, right in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, right, rtol=2**-7, atol=1e-4)
    assert (found[2] - expected[2]).norm() < 1e-5 * expected[2].norm()


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_is_that_of_the_rounded_result(shape, kind):
    """But for the order of the sum of squares: a number may be the neighbour in bfloat16, and then in E4M3."""
    x, gain, _ = problem(*shape)
    found, expected = (rms_norm_quantised(x, gain, 1e-6, kind, backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(found.scales, expected.scales, rtol=2**-7 if kind == "float" else 0, atol=0)
    assert (found.values.view(torch.uint8) != expected.values.view(torch.uint8)).float().mean() < 0.01
    torch.testing.assert_close(dequantise_rows(found), dequantise_rows(expected), rtol=2**-2, atol=1e-2)
