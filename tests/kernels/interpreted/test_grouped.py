"""Grouped products against one product per expert in float64, in both forms: ragged, empty and unowned rows, sizes that
are no multiple of a tile, outputs and unowned rows poisoned."""

import pytest
import torch

module = pytest.importorskip("lit_kernels.gpu.grouped")
from lit_kernels.grouped import _grouped_mm, _grouped_mm_weights, experts, experts_reference, grouped_mm  # noqa: E402

FORMS = ["pointers", "descriptors"]
COUNTS = {
    "uneven": [1, 0, 139, 64],
    "empty ends": [0, 130, 7, 0],
    "a tail": [3, 65, 0, 2],
    "a tail of tiles": [3, 1],
    "none": [0, 0, 0],
}
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}  # the result's one rounding, and sums


def normal(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def per_expert(counts):
    ends = ends_of(counts).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def error(found, exact):
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.fixture
def poisoned(monkeypatch):
    real = torch.Tensor.new_empty

    def new_empty(self, *args, **settings):
        out = real(self, *args, **settings)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_rows_and_their_gradient(form, counts):
    """More tiles than programs; rows of nobody hold NaN and must not come out."""
    S, F, K = 210, 264, 128
    x, w = normal(S, K), normal(len(counts), F, K, seed=1)
    ends = ends_of(counts)
    x[int(ends[-1]) :] = float("nan")
    for transposed, weights in ((False, w), (True, w.transpose(1, 2).contiguous())):
        exact = torch.zeros(S, F, dtype=torch.float64)
        for e, rows in enumerate(per_expert(counts)):
            exact[rows] = x[rows].double() @ w[e].double().t()
        out = module.grouped_mm(x, weights, ends, transposed, form)
        assert error(out, exact) < BOUNDS[torch.bfloat16] and (out[int(ends[-1]) :] == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_weights_gradient(form, counts):
    S, F, D = 210, 136, 264
    grad, x = normal(S, F), normal(S, D, seed=1)
    ends = ends_of(counts)
    grad[int(ends[-1]) :] = x[int(ends[-1]) :] = float("nan")
    out = module.grouped_mm_weights(grad, x, ends, form)
    exact = torch.stack([grad[rows].double().t() @ x[rows].double() for rows in per_expert(counts)])
    assert error(out, exact) < BOUNDS[torch.bfloat16]
    assert all((out[e] == 0).all() for e, count in enumerate(counts) if count == 0)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_next_expert_holds_is_not_summed(form):
    """The last rows of an expert share a step with the first of the next, which here are NaN: as is its weight."""
    x, w, ends = normal(140, 96), normal(2, 136, 96, seed=1), ends_of([70, 70])
    x[70:] = w[1] = float("nan")
    for transposed, weights in ((False, w), (True, w.transpose(1, 2).contiguous())):
        found = module.grouped_mm(x, weights, ends, transposed, form if not transposed else "pointers")
        assert found[:70].isfinite().all() and found[70:].isnan().all()
    dw = module.grouped_mm_weights(x, x, ends, form)
    assert dw[0].isfinite().all() and dw[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_by_autograd(dtype):
    """Through the custom ops, odd sizes, a gradient with strides of 0."""
    counts = [5, 0, 17]
    x, w, ends = normal(24, 13, dtype=dtype), normal(3, 7, 13, seed=1, dtype=dtype), ends_of(counts)
    ours = [one.clone().requires_grad_() for one in (x, w)]
    wide = [one.double().requires_grad_() for one in (x, w)]
    out = grouped_mm(*ours, ends, backend="triton")
    exact = torch.cat([wide[0][rows] @ wide[1][e].t() for e, rows in enumerate(per_expert(counts))])
    assert error(out[:22], exact) < BOUNDS[dtype]
    out.sum().backward()
    exact.sum().backward()
    for found, right in zip(ours, wide, strict=True):
        assert found.grad is not None and right.grad is not None
        assert found.grad.dtype == dtype and error(found.grad, right.grad) < BOUNDS[dtype]


def test_ops_keep_torchs_rules():
    x, w, ends = normal(9, 16).requires_grad_(), normal(2, 8, 16, seed=1).requires_grad_(), ends_of([4, 3])
    torch.library.opcheck(_grouped_mm, (x, w, ends, False))
    torch.library.opcheck(_grouped_mm, (normal(9, 8).requires_grad_(), w, ends, True))
    torch.library.opcheck(_grouped_mm_weights, (normal(9, 8), x.detach(), ends))


def test_nothing_to_multiply():
    ends = ends_of([0, 0])
    assert module.grouped_mm(normal(0, 16), normal(2, 8, 16), ends).shape == (0, 8)
    assert (module.grouped_mm_weights(normal(0, 8), normal(0, 16), ends) == 0).all()
    assert (module.grouped_mm(normal(4, 16)[:, :0], normal(2, 8, 16)[:, :, :0], ends_of([2, 2])) == 0).all()


def test_what_does_not_fit_is_refused():
    x, w, ends = normal(4, 24), normal(2, 8, 24), ends_of([2, 2])
    with pytest.raises(ValueError, match=r"ends of torch\.int64; valid: .*int32"):
        module.grouped_mm(x, w, ends.long())
    with pytest.raises(ValueError, match="valid: shapes that fit"):
        module.grouped_mm(x, w, ends, transposed=True)
    with pytest.raises(ValueError, match=r"w transposed K a multiple of 64. Type form='pointers'"):
        module.grouped_mm(x, w.transpose(1, 2).contiguous(), ends, True, "descriptors")
    with pytest.raises(ValueError, match="valid: 8 or 16 bits"):
        module.grouped_mm(x.float(), w.float(), ends, form="descriptors")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_experts_by_kernels(precision):
    """Everything by Triton, one dropped choice; FP8 within its noise: 2% of each of two products and of a gradient."""
    N, K, E, D, F_ = 11, 2, 3, 32, 16
    x, gate_up, down = normal(N, D), normal(E, 2 * F_, D, seed=1) / 6, normal(E, D, F_, seed=2) / 4
    chosen = torch.randint(E, (N, K), generator=torch.Generator().manual_seed(3))
    chosen[4, 1] = E
    weights = normal(N, K, seed=4).abs()
    ours = [one.clone().requires_grad_() for one in (x, weights, gate_up, down)]
    wide = [one.double().requires_grad_() for one in (x, weights, gate_up, down)]
    found = experts(ours[0], chosen, ours[1], *ours[2:], backend="triton", precision=precision)
    exact = experts_reference(wide[0], chosen, wide[1], *wide[2:])
    grad = normal(N, D, seed=5)
    found.backward(grad)
    exact.backward(grad.double())
    bound = {"bf16": 1e-2, "fp8": 8e-2}[precision]
    for one, right in zip([found, *(o.grad for o in ours)], [exact, *(w.grad for w in wide)], strict=True):
        assert error(one, right) < bound
