"""Grouped products against one product per expert in float64, with uneven, empty and unowned rows."""

import pytest
import torch
import torch.nn.functional as F
from lit_kernels.grouped import experts, experts_reference, grouped_mm

COUNTS = {
    "even": [8, 8, 8, 8],
    "uneven": [1, 0, 23, 5],
    "empty ends": [0, 9, 4, 0],
    "a tail": [3, 5, 0, 2],
    "none": [0] * 4,
}


def problem(counts, D=16, F_=24, rows=32, dtype=torch.float32):
    torch.manual_seed(0)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return torch.randn(rows, D, dtype=dtype), torch.randn(len(counts), F_, D, dtype=dtype), ends


def one_by_one(x, w, ends):
    out, start = torch.zeros(len(x), w.shape[1], dtype=x.dtype), 0
    for e, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end] @ w[e].t()
        start = end
    return out


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_experts_rows_and_all_gradients(counts, dtype):
    x, w, ends = problem(counts, dtype=dtype)
    x.requires_grad_()
    w.requires_grad_()
    wide = [one.detach().double().requires_grad_() for one in (x, w)]
    out, exact = grouped_mm(x, w, ends), one_by_one(*wide, ends)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight.to(dtype)).sum().backward()
    (exact * weight.to(dtype).double()).sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for found, right in ((out, exact), (x.grad, wide[0].grad), (w.grad, wide[1].grad)):
        assert found is not None and right is not None
        torch.testing.assert_close(found.double(), right, rtol=bound, atol=bound)
    assert (out[int(ends[-1]) :] == 0).all() and (x.grad[int(ends[-1]) :] == 0).all()
    assert all((w.grad[e] == 0).all() for e, n in enumerate(counts) if n == 0)


def test_memory_that_nobody_wrote_does_not_come_out(monkeypatch):
    """torch leaves the rows of nobody as they were: here NaN."""
    real = F.grouped_mm

    def poisoned(a, b, *, offs):
        out = real(a, b, offs=offs)
        if out.dim() == 2:
            out[int(offs[-1]) :] = float("nan")
        else:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    x, w, ends = problem([3, 0, 5, 2])
    x.requires_grad_()
    w.requires_grad_()
    grouped_mm(x, w, ends).sum().backward()  # and a gradient with strides of 0
    assert x.grad is not None and w.grad is not None and x.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("E", [4, 7])
def test_experts_are_the_loop_over_them(E):
    torch.manual_seed(1)
    N, K, D, F_ = 37, 2, 16, 8
    x, gate_up, down = torch.randn(N, D), torch.randn(E, 2 * F_, D), torch.randn(E, D, F_)
    chosen = torch.randn(N, E).topk(K).indices
    weights = torch.rand(N, K)
    inputs = [one.double().requires_grad_() for one in (x, weights, gate_up, down)]
    ours = [one.clone().requires_grad_() for one in (x, weights, gate_up, down)]
    exact = experts_reference(inputs[0], chosen, inputs[1], *inputs[2:])
    found = experts(ours[0], chosen, ours[1], *ours[2:])
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    weight = torch.randn(N, D)
    (found * weight).sum().backward()
    (exact * weight).sum().backward()
    for one, right in zip(ours, inputs, strict=True):
        assert one.grad is not None and right.grad is not None
        torch.testing.assert_close(one.grad.double(), right.grad, rtol=1e-4, atol=1e-4)


def test_a_choice_of_no_expert_counts_for_nothing():
    torch.manual_seed(2)
    x, gate_up, down = torch.randn(5, 8), torch.randn(3, 16, 8), torch.randn(3, 8, 8)
    chosen, weights = torch.tensor([[0, 3], [1, 2], [3, 3], [2, 0], [1, 3]]), torch.rand(5, 2)
    found = experts(x, chosen, weights, gate_up, down)
    torch.testing.assert_close(found, experts_reference(x, chosen, weights, gate_up, down), rtol=1e-4, atol=1e-4)
    assert (found[2] == 0).all()


def test_what_torch_would_refuse_is_said_first():
    x, w, ends = problem([8, 8, 8, 8], D=14)
    with pytest.raises(ValueError, match=r"D=14 of torch\.float32; valid: a multiple of 4"):
        grouped_mm(x, w, ends)
    x, w, ends = problem([8, 8, 8, 8])
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, the experts are torch\.float32"):
        grouped_mm(x.bfloat16(), w, ends)
