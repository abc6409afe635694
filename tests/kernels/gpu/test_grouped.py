"""The grouped products on a GPU at the sizes of DeepSeek-V3's experts: against one product per expert, and the same
from run to run."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

E, F_, D = 8, 4096, 7168
COUNTS = [1031, 0, 700, 1, 1300, 128, 900, 64]
S = sum(COUNTS) + 77  # rows of nobody


def problem():
    torch.manual_seed(0)
    x, w = torch.randn(S, D, device="cuda").bfloat16(), torch.randn(E, F_, D, device="cuda").bfloat16() / D**0.5
    x[sum(COUNTS) :] = float("nan")
    grad = torch.randn(S, F_, device="cuda").bfloat16()
    return x.requires_grad_(), w.requires_grad_(), torch.tensor(COUNTS, device="cuda").cumsum(0).to(torch.int32), grad


def per_expert(x, w, grad):
    """y, dx and dw in float32."""
    y, dx, dw = x.new_zeros(S, F_).float(), torch.zeros_like(x).float(), torch.zeros_like(w).float()
    start = 0
    for e, count in enumerate(COUNTS):
        rows, start = slice(start, start + count), start + count
        y[rows], dx[rows] = x[rows].float() @ w[e].float().t(), grad[rows].float() @ w[e].float()
        dw[e] = grad[rows].float().t() @ x[rows].float()
    return y, dx, dw


def results(function, backend):
    x, w, ends, grad = problem()
    y = function(x, w, ends, backend=backend)
    y.backward(grad)
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("name", ["bf16", "fp8"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_products_and_run_to_run_identity(name, backend):
    from lit_kernels.grouped import grouped_mm
    from lit_kernels.grouped_fp8 import fp8_grouped_mm

    function, bound = {"bf16": (grouped_mm, 4e-3), "fp8": (fp8_grouped_mm, 10 ** (-26 / 20))}[name]
    found = results(function, backend)
    x, w, _, grad = problem()
    for one, right in zip(found, per_expert(x.detach(), w.detach(), grad), strict=True):
        assert (one.float() - right).norm() / right.norm() < bound
    assert (found[0][sum(COUNTS) :] == 0).all() and (found[1][sum(COUNTS) :] == 0).all() and (found[2][1] == 0).all()
    if backend == "triton":
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(found, results(function, backend), strict=True))


@pytest.mark.parametrize("form", ["pointers", "descriptors"])
def test_fp8_forms_are_the_emulation(form):
    from lit_kernels import grouped_fp8
    from lit_kernels.fp8 import Quantised
    from lit_kernels.gpu import grouped

    x, w, ends, grad = (one.detach() for one in problem())
    *rows, values, scales = grouped_fp8._by_expert(x, ends, "float", "triton")
    of_grad = grouped_fp8._by_expert(grad, ends, "float", "triton")[2:]
    experts = grouped_fp8._experts(w, "float", False, "triton")
    pairs = (
        (
            grouped.fp8_gemm(Quantised(*rows), Quantised(*experts), ends, torch.float32, form),
            grouped_fp8._product(*rows, *experts, ends, torch.float32, "emulate"),
        ),
        (
            grouped.fp8_gemm_weights(Quantised(*of_grad), Quantised(values, scales), ends, S, torch.float32, form),
            grouped_fp8._product_weights(*of_grad, values, scales, ends, S, torch.float32, "emulate"),
        ),
    )
    for found, right in pairs:  # tensor cores keep about 14 bits of a sum of 128
        assert (found - right).norm() / right.norm() < 1e-3
