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


@pytest.mark.parametrize("activation", [F.silu, torch.nn.PReLU(8, init=0.2)], ids=["silu", "one that learns"])
def test_choices_of_nobody_and_what_an_activation_learns(activation):
    """A dropped token's NaN stays its own; experts 1 and 4 are chosen by nobody, and get zeros."""
    E, N, D, F_ = 5, 12, 16, 8
    torch.manual_seed(3)
    chosen = torch.tensor([0, 2, 3])[torch.rand(N, 3).topk(2).indices]
    chosen[3, 0], chosen[5, 1], chosen[7] = -1, E, E + 1
    x, weights = torch.randn(N, D), torch.rand(N, 2)
    weights_of = [torch.randn(E, 2 * F_, D) / 4, torch.randn(E, D, F_) / 3]
    results = []
    for form, poison in ((experts, float("nan")), (experts_reference, 0.0)):
        ours = [one.clone() for one in (x, weights, *weights_of)]
        ours[0][7] = poison
        leaves = [one.requires_grad_() for one in ours]
        learnt = list(activation.parameters()) if isinstance(activation, torch.nn.Module) else []
        out = form(leaves[0], chosen, *leaves[1:], activation)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*leaves, *learnt])))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert (results[0][3][[1, 4]] == 0).all() and (results[0][4][[1, 4]] == 0).all()


def test_experts_compile_on_a_cpu_as_they_run():
    torch.manual_seed(4)
    x, gate_up, down = (torch.randn(*shape).bfloat16() / 4 for shape in ((9, 16), (3, 16, 16), (3, 16, 8)))
    chosen, weights = torch.randn(9, 3).topk(2).indices, torch.rand(9, 2)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    inputs = (x, chosen, weights, gate_up, down)
    torch.testing.assert_close(compiled(*inputs), experts(*inputs), rtol=2e-2, atol=2e-3)


def test_what_torch_would_refuse_is_said_first():
    x, w, ends = problem([8, 8, 8, 8], D=14)
    with pytest.raises(ValueError, match=r"D=14 of torch\.float32; valid: a multiple of 4"):
        grouped_mm(x, w, ends)
    x, w, ends = problem([8, 8, 8, 8])
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, the experts are torch\.float32"):
        grouped_mm(x.bfloat16(), w, ends)
