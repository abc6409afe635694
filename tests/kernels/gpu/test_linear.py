"""The FP8 linear layer on a GPU: 28 dB over its error, compiled too, and from run to run."""

import pytest
import torch
import torch.nn.functional as F
from lit_kernels.gemm import missing_for_torch
from lit_kernels.linear import fp8_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def gradients(inputs, grad, linear, **settings):
    inputs = [one.detach().requires_grad_() for one in inputs]
    y = linear(*inputs, **settings)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(one.grad for one in inputs)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("M", [4096, 1001])
def test_all_products_are_28_db_over_their_error(M, backend, compiled):
    N, K = 2048, 7168
    if backend == "torch" and (reason := missing_for_torch(torch.device("cuda"), N, K)):
        pytest.skip(reason)
    torch.manual_seed(0)
    x, w, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((M, K), (N, K), (M, N)))
    linear = torch.compile(fp8_linear, fullgraph=True) if compiled else fp8_linear
    exact = gradients([x.double(), w.double()], grad, F.linear)
    found = gradients([x, w], grad, linear, backend=backend)
    for one, right in zip(found, exact, strict=True):
        assert 20 * torch.log10(right.norm() / (right - one.double()).norm()) >= 28
    for one, again in zip(found, gradients([x, w], grad, linear, backend=backend), strict=True):
        assert torch.equal(one, again)
