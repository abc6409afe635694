"""Tokens to their experts and back on a GPU: the reference's rows, bit by bit, and sums, the same from run to run."""

import pytest
import torch
from lit_kernels.permute import permute, permute_quantised, unpermute

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SHAPES = [(4096, 8, 256, 7168), (4001, 6, 64, 2048), (1, 8, 16, 100)]


def problem(N, K, E, D):
    """Every eleventh choice or so is nobody's."""
    torch.manual_seed(0)
    experts = torch.rand(N, E + E // 10 + 1, device="cuda").topk(K).indices
    return torch.randn(N, D, device="cuda", dtype=torch.bfloat16), experts, torch.rand(N, K, device="cuda"), E


def every(x, experts, weights, E, backend):
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    rows, ends, place = permute(x, experts, E, backend)
    rows.retain_grad()
    out = unpermute(rows, place, weights, backend)
    out.backward(torch.ones_like(out) + x.detach())
    return (rows.detach(), ends, place, rows.grad), (out.detach(), x.grad, weights.grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape):
    inputs = problem(*shape)
    found, again, expected = (every(*inputs, backend) for backend in ("triton", "triton", "torch"))
    for one, right, other in zip(found[0], expected[0], again[0], strict=True):
        assert torch.equal(one, right) and torch.equal(one, other)
    for one, right, other in zip(found[1], expected[1], again[1], strict=True):
        torch.testing.assert_close(one, right, rtol=2**-7, atol=2e-2)  # of sums with terms that cancel
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_is_that_of_the_permuted_rows(shape, kind):
    x, experts, _, E = problem(*shape)
    found, expected = (permute_quantised(x, experts, E, kind, backend).rows for backend in ("triton", "torch"))
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)
