"""Grouped FP8 by kernels: the quantisers bit by bit, products against float64 sums of the dequantised operands."""

import pytest
import torch
from lit_kernels import grouped_fp8
from lit_kernels.fp8 import Quantised, dequantise_blocks, dequantise_rows, quantise_rows_reference
from lit_kernels.grouped_fp8 import (
    blocks_by_expert,
    fp8_grouped_mm,
    quantise_by_expert_reference,
    quantise_experts_reference,
)

module = pytest.importorskip("lit_kernels.gpu.grouped")
quantise = pytest.importorskip("lit_kernels.gpu.grouped_quantise")
FORMS = ["pointers", "descriptors"]
COUNTS = {"uneven": [1, 0, 139, 60], "a tail": [3, 130, 0], "exact blocks": [128, 0, 128], "none": [0, 0]}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ends_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def per_expert(counts):
    ends = ends_of(counts).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def rows_of(counts, D):
    """Blocks of scales of their own, a row of zeros, and NaN in rows of nobody, of which there are 7."""
    x = normal(sum(counts) + 7, D) * torch.exp(normal(sum(counts) + 7, 1, seed=1))
    x[2] = 0
    x[sum(counts) :] = float("nan")
    return x.bfloat16()


@pytest.fixture
def poisoned(monkeypatch):
    real = torch.Tensor.new_empty

    def new_empty(self, *args, **settings):
        out = real(self, *args, **settings)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_rows_by_expert_are_the_references_bytes(counts, kind):
    x, ends = rows_of(counts, 144), ends_of(counts)
    found = quantise.quantise_by_expert(x, ends, blocks_by_expert(len(x), len(counts)), kind)
    for one, right in zip(found, quantise_by_expert_reference(x, ends, kind), strict=True):
        assert torch.equal(one.values.view(torch.uint8), right.values.view(torch.uint8))
        assert torch.equal(one.scales, right.scales) and one.scales.stride() == right.scales.stride()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["float", "power of two"])
def test_experts_are_the_references_bytes(kind, transposed):
    w = normal(3, 144, 272) * torch.tensor([1.0, 64.0, 1e-3])[:, None, None].bfloat16()
    found, right = (f(w, kind, transposed) for f in (quantise.quantise_experts, quantise_experts_reference))
    assert torch.equal(found.values.view(torch.uint8), right.values.view(torch.uint8))
    assert torch.equal(found.scales, right.scales)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_sums_of_the_dequantised(form, counts):
    F, K = 272, 272  # blocks of 128 and a rest, each block of a scale of its own
    x, ends = rows_of(counts, K), ends_of(counts)
    w = normal(len(counts), F, K, seed=2) * 2.0 ** torch.arange(F)[:, None].div(128, rounding_mode="floor") * 3
    a, b = quantise_rows_reference(x), quantise_experts_reference(w.bfloat16())
    exact = torch.zeros(len(x), F, dtype=torch.float64)
    for e, rows in enumerate(per_expert(counts)):
        wide = dequantise_blocks(Quantised(b.values[e], b.scales[e])).double()
        exact[rows] = dequantise_rows(Quantised(a.values[rows], a.scales[rows])).double() @ wide.t()
    out = module.fp8_gemm(a, b, ends, torch.float32, form)
    assert error(out, exact) < 1e-6 and (out[int(ends[-1]) :] == 0).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_weights_gradient_is_the_sums_of_the_dequantised(form, counts):
    grad, x, ends = rows_of(counts, 144), rows_of(counts, 272).flip(1), ends_of(counts)
    a, b = (quantise_by_expert_reference(one, ends)[1] for one in (grad, x))
    out = module.fp8_gemm_weights(a, b, ends, len(x), torch.float32, form)
    exact, first, (wide_a, wide_b) = [], 0, (dequantise_rows(q).double() for q in (a, b))
    for rows in per_expert(counts):
        last = first + -(-(rows.stop - rows.start) // 128) * 128
        exact.append(wide_a[:, first:last] @ wide_b[:, first:last].t())
        first = last
    assert error(out, torch.stack(exact)) < 1e-6
    assert all((out[e] == 0).all() for e, count in enumerate(counts) if count == 0)


@pytest.mark.parametrize("kind", ["float", "power of two"])
def test_triton_and_emulation_agree(kind):
    """Output and both gradients: the same quantised numbers, other orders of float32 sums, one rounding to bf16."""
    counts = [5, 0, 130]
    results = []
    for backend in ("triton", "emulate"):
        x, w = normal(140, 48).requires_grad_(), normal(3, 32, 48, seed=1).requires_grad_()
        out = fp8_grouped_mm(x, w, ends_of(counts), backend=backend, kind=kind)
        out.backward(normal(140, 32, seed=2))
        results.append((out, x.grad, w.grad))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=2**-7, atol=1e-3)


def test_ops_keep_torchs_rules():
    ends, w = ends_of([4, 3]), normal(2, 32, 16)
    by_expert = grouped_fp8._by_expert(normal(9, 16), ends, "float", "triton")
    quantised = grouped_fp8._experts(w, "float", False, "triton")
    check = torch.library.opcheck
    check(grouped_fp8._by_expert, (normal(9, 16), ends, "float", "triton"))
    check(grouped_fp8._experts, (w, "float", True, "triton"))
    without_schema = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )  # it multiplies E4M3
    product = (*by_expert[:2], *quantised, ends, torch.bfloat16, "triton")
    check(grouped_fp8._product, product, test_utils=without_schema)
    product = (*by_expert[2:], *by_expert[2:], ends, 9, torch.bfloat16, "triton")
    check(grouped_fp8._product_weights, product, test_utils=without_schema)
