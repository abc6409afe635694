"""Tokens to their experts and back by the kernels, against plain torch and float64."""

import pytest
import torch

pytest.importorskip("triton")
from lit_kernels.permute import (
    permute,
    permute_quantised,
    permute_quantised_reference,
    permute_reference,
    sort_by_expert,
    unpermute,
)

CASES = {  # N, K, E, D
    "plain": (12, 2, 4, 256),
    "three choices, a width that fits nothing": (9, 3, 5, 203),
    "several steps of columns": (4, 2, 3, 2100),
    "one": (1, 1, 1, 3),
}


def problem(N, K, E, D, dtype=torch.bfloat16):
    """Among the choices are -1 and E, which are nobody's, and expert 1 gets none."""
    generator = torch.Generator().manual_seed(N)
    experts = torch.randint(-1, E + 1, (N, K), generator=generator)
    if E > 1:
        experts[experts == 1] = 0
    x, weights = torch.randn(N, D, generator=generator), torch.rand(N, K, generator=generator)
    return x.to(dtype), experts, weights


def gradients(function, inputs, grad):
    inputs = [one.detach().requires_grad_() for one in inputs]
    out = function(*inputs)
    out.backward(grad)
    return [out.detach(), *(one.grad for one in inputs)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_and_what_flows_back(case):
    """float64: grad x_n is the sum of the gradients at its places; a rounding of 2**-8 to bfloat16."""
    (N, K, E, D), (x, experts, _) = case, problem(*case)
    for one, right in zip(permute(x, experts, E, "triton"), permute_reference(x, experts, E), strict=True):
        assert one.dtype == right.dtype and torch.equal(one, right)
    grad = torch.randn(N * K, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, grad_x = gradients(lambda x: permute(x, experts, E, "triton").rows_SD, [x], grad)
    place = sort_by_expert(experts, E)[2]
    right = (grad.double()[place] * (place >= 0)[..., None]).sum(1)
    assert grad_x.dtype == torch.bfloat16
    assert ((grad_x - right).abs() <= 2.0**-8 * right.abs() + K * 2.0**-24 * grad.abs().max()).all()


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_fp8_is_that_of_the_permuted_rows(case, kind):
    x, experts, _ = problem(*case)
    found = permute_quantised(x, experts, case[2], kind, "triton")
    right = permute_quantised_reference(x, experts, case[2], kind)
    assert torch.equal(found.rows.values.view(torch.uint8), right.rows.values.view(torch.uint8))
    assert torch.equal(found.rows.scales, right.rows.scales)
    assert found.rows.scales.stride() == right.rows.scales.stride()
    assert torch.equal(found.ends_E, right.ends_E) and torch.equal(found.place_NK, right.place_NK)


@pytest.mark.parametrize("more", [0, 5], ids=["rows", "rows and more"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_weighted_sums_and_their_gradients(case, more):
    """Rows of nobody hold NaN: they must not be read, and their gradient is zero."""
    (N, K, E, D), (_, experts, weights) = case, problem(*case)
    _, ends, place = sort_by_expert(experts, E)
    generator = torch.Generator().manual_seed(2)
    rows, grad = (torch.randn(n, D, generator=generator).bfloat16() for n in (N * K + more, N))
    rows[ends[-1] :] = float("nan")
    out, grad_rows, grad_weights = gradients(
        lambda rows, weights: unpermute(rows, place, weights, "triton"), [rows, weights], grad
    )
    wide, weight = rows.double().nan_to_num(0), weights.double() * (place >= 0)
    right = (wide[place.clamp(min=0)] * weight[..., None]).sum(1)
    assert out.dtype == grad_rows.dtype == torch.bfloat16 and grad_weights.dtype == torch.float32
    assert ((out - right).abs() <= 2.0**-8 * right.abs() + K * 2.0**-24 * wide.abs().max()).all()
    assert (grad_rows[ends[-1] :] == 0).all() and grad_rows.shape == rows.shape
    for n, k in torch.argwhere(place >= 0).tolist():
        exact = weight[n, k] * grad[n].double()
        assert ((grad_rows[place[n, k]] - exact).abs() <= (2.0**-8 + 2.0**-23) * exact.abs()).all()
    exact = (wide[place.clamp(min=0)] * grad.double()[:, None]).sum(-1) * (place >= 0)
    torch.testing.assert_close(grad_weights.double(), exact, rtol=1e-5, atol=1e-5)
    assert (grad_weights[place < 0] == 0).all()


def test_a_gradient_that_is_not_a_number_stays_with_its_token():
    place, rows, weights = torch.tensor([[0, -1], [1, 2]]), torch.ones(3, 8), torch.ones(2, 2)
    grad = torch.ones(2, 8)
    grad[0] = float("nan")
    _, grad_rows, grad_weights = gradients(lambda *a: unpermute(a[0], place, a[1], "triton"), [rows, weights], grad)
    assert grad_rows.isnan().all(1).tolist() == [True, False, False]
    assert grad_weights.isnan().tolist() == [[True, False], [False, False]] and grad_weights[0, 1] == 0


def test_nothing_that_was_in_memory_comes_out(monkeypatch):
    x, experts, weights = problem(9, 3, 5, 200)
    place = sort_by_expert(experts, 5)[2]
    assert (place < 0).sum() > 3

    def everything():
        rows = permute(x, experts, 5, "triton").rows_SD
        out = gradients(lambda *a: unpermute(a[0], place, a[1], "triton"), [rows, weights], x)
        back = gradients(lambda x: permute(x, experts, 5, "triton").rows_SD, [x], rows)
        return [*out, *back, *permute_quantised(x, experts, 5, backend="triton").rows]

    expected, real = everything(), torch.Tensor.new_empty

    def poisoned(*arguments, **settings):
        made = real(*arguments, **settings)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for one, right in zip(everything(), expected, strict=True):
        assert torch.equal(one.float(), right.float())


def test_no_tokens_no_rows_and_other_strides():
    x, experts, weights = problem(6, 2, 3, 40)
    empty = permute(x[:0], experts[:0], 3, "triton")
    assert empty.rows_SD.shape == (0, 40) and empty.ends_E.tolist() == [0, 0, 0]
    assert unpermute(empty.rows_SD, empty.place_NK, weights[:0], "triton").shape == (0, 40)
    none = torch.full_like(experts, 3)
    rows, ends, place = permute(x, none, 3, "triton")
    assert (rows == 0).all() and (place == -1).all() and int(ends[-1]) == 0
    out, grad_rows, grad_weights = gradients(lambda *a: unpermute(a[0], place, a[1], "triton"), [rows, weights], x)
    assert (out == 0).all() and (grad_rows == 0).all() and (grad_weights == 0).all()
    turned = permute(x.t().contiguous().t(), experts.t().contiguous().t(), 3, "triton")
    assert torch.equal(turned.rows_SD, permute_reference(x, experts, 3).rows_SD)


def test_operations_are_registered_as_they_behave():
    x, experts, weights = problem(6, 2, 3, 40, torch.float32)
    rows, ends, place = permute_reference(x, experts, 3)
    ops = torch.ops.lit_kernels
    torch.library.opcheck(ops.permute.default, (x.clone().requires_grad_(), place, ends))
    torch.library.opcheck(ops.permute_backward.default, (rows, place))
    torch.library.opcheck(ops.permute_quantised.default, (x, place, ends, "float"))
    torch.library.opcheck(ops.unpermute.default, (rows.clone().requires_grad_(), place, weights.requires_grad_()))
    torch.library.opcheck(ops.unpermute_backward.default, (x, rows, place, weights.detach()))


def test_compiled_in_one_graph():
    x, experts, weights = problem(6, 2, 3, 40)

    def there_and_back(x, weights):
        rows, _, place = permute(x, experts, 3, "triton")
        return unpermute(rows, place, weights, "triton")

    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    found, right = (gradients(function, [x, weights], x) for function in (compiled, there_and_back))
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one, other)
