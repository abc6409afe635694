"""The log-prob kernels on a GPU: against float64, from run to run, and what they take of its memory."""

import pytest
import torch
from lit_kernels.logprobs import linear_logprobs, linear_logprobs_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def problem(M, V, D, dtype=torch.bfloat16):
    torch.manual_seed(0)
    states = (4 * D**-0.5 * torch.randn(M, D, device="cuda")).to(dtype).requires_grad_()
    return states, torch.randn(V, D, device="cuda").to(dtype).requires_grad_(), torch.randint(V, (M,), device="cuda")


def run(function, states, weight, target, **settings):
    states, weight = (x.detach().requires_grad_() for x in (states, weight))
    outputs = function(states, weight, target, 0.7, **settings)
    rows = torch.arange(1, len(states) + 1, device="cuda").double().cos()
    (rows * (outputs[0] - 0.3 * outputs[1])).sum().backward()
    return *(out.detach() for out in outputs), states.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(512, 32000, 2048), (1000, 5003, 1016), (130, 777, 70)], ids=str)
def test_against_float64_and_from_run_to_run(shape, dtype):
    """The last width is no multiple of 16 bytes in 16 bits, so that tiles go by pointers."""
    states, weight, target = problem(*shape, dtype)
    found = run(linear_logprobs, states, weight, target, backend="triton")
    right = run(linear_logprobs_reference, states.double(), weight.double(), target)
    assert (found[0] <= 0).all()
    for one, expected in zip(found, right, strict=True):
        step = 1e-5 if one.dtype == torch.float32 else 2**-8
        assert (one.double() - expected).norm() < step * expected.norm()
    for _ in range(5):
        again = run(linear_logprobs, states, weight, target, backend="triton")
        assert all(map(torch.equal, again, found))


def test_memory_is_far_below_that_of_logits():
    """At its peak: both gradients, a float32 sum and its share for the states, and 256 MiB; logits alone are 2 GB."""
    states, weight, target = problem(8192, 128256, 1024)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(linear_logprobs, states, weight, target, backend="triton")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * (states.numel() + weight.numel()) + 8 * states.numel() + 2**28 + 2**26
