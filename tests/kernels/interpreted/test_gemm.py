"""The FP8 product against float64 sums of the dequantised operands, and what FP8 costs."""

import pytest
import torch
from lit_kernels.fp8 import (
    Quantised,
    dequantise_blocks,
    dequantise_rows,
    gemm_reference,
    quantise_blocks_reference,
    quantise_both_reference,
    quantise_rows_reference,
)

module = pytest.importorskip("lit_kernels.gpu.gemm")
gemm = module.gemm
FORMS = ["pointers", *module.LAUNCHES]
SHAPES = [(64, 128, 128), (100, 200, 272), (1, 3, 128), (130, 129, 48)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
def test_sums_are_those_of_the_dequantised_operands(shape, in_blocks):
    M, N, K = shape
    a = quantise_rows_reference(normal(M, K) * torch.exp(normal(M, 1, seed=1)))
    b = (quantise_blocks_reference if in_blocks else quantise_rows_reference)(normal(N, K, seed=2))
    wide = (dequantise_blocks if in_blocks else dequantise_rows)(b)
    exact = dequantise_rows(a).double() @ wide.double().t()
    assert error(gemm(a, b, torch.float32), exact) < 1e-6  # float32 sums of K terms
    assert error(gemm(a, b), exact) < 2e-3  # one rounding to bfloat16: at most 2**-9, uniform below it
    torch.testing.assert_close(gemm(a, b), gemm_reference(a, b), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("shape", [(130, 144, 272), (16, 1168, 128), (1180, 160, 144)], ids=str)
@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
@pytest.mark.parametrize("form", module.LAUNCHES)
def test_every_tile_is_computed_once_and_as_by_pointers(monkeypatch, form, in_blocks, shape):
    """More tiles than programs, and more rows of tiles than are walked together; outputs are poisoned."""
    M, N, K = shape
    a = quantise_rows_reference(normal(M, K) * torch.exp(normal(M, 1, seed=1)))
    b = (quantise_blocks_reference if in_blocks else quantise_rows_reference)(normal(N, K, seed=2))
    expected = gemm(a, b, torch.float32, "pointers")
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: real(*args, **kw).fill_(float("nan")))
    torch.testing.assert_close(gemm(a, b, torch.float32, form), expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


def test_what_tma_cannot_address_is_refused():
    a, b = quantise_rows_reference(normal(8, 136)), quantise_rows_reference(normal(16, 136))
    with pytest.raises(ValueError, match=r"got K=136 and N=16.*valid: .*a multiple of 16 bytes"):
        gemm(a, b, form="descriptors")


@pytest.mark.parametrize("form", FORMS)
def test_scales_of_another_column_are_not_taken(form):
    """Every block of a scale of its own: a wrong index is off by a factor of two at least."""
    a, b = normal(64, 512), normal(256, 512, seed=1)
    a *= 2.0 ** torch.arange(4).repeat_interleave(128)
    b *= 2.0 ** (torch.arange(4).repeat_interleave(128) * 3)
    b[128:] *= 1 / 64
    quantised = quantise_rows_reference(a), quantise_blocks_reference(b)
    assert error(gemm(*quantised, form=form), a.double() @ b.double().t()) < 0.05


def test_all_three_products_of_a_linear_layer():
    """y = x w^T, dx = dy w, dw = dy^T x, each 28 dB over its error at least (DeepGEMM's and torchao's bound)."""
    x_MK, w_NK, dy_MN = normal(192, 256), normal(128, 256, seed=1), normal(192, 128, seed=2)
    x, x_t = quantise_both_reference(x_MK)
    dy, dy_t = quantise_both_reference(dy_MN)
    products = {
        "y": (gemm(x, quantise_blocks_reference(w_NK)), x_MK @ w_NK.t()),
        "dx": (gemm(dy, quantise_blocks_reference(w_NK.t())), dy_MN @ w_NK),
        "dw": (gemm(dy_t, x_t, torch.float32), dy_MN.t() @ x_MK),
    }
    for name, (found, exact) in products.items():
        assert error(found, exact.double()) < 10 ** (-28 / 20), name


def test_what_does_not_fit_is_refused():
    a, b = quantise_rows_reference(normal(4, 256)), quantise_rows_reference(normal(8, 128))
    with pytest.raises(ValueError, match=r"got a \(4, 256\) with scales \(4, 2\) and b \(8, 128\).*valid: \(M, K\)"):
        gemm(a, b)
    with pytest.raises(ValueError, match="valid:"):
        gemm(a, Quantised(normal(8, 256).to(a.values.dtype), torch.ones(8, 1)))
    assert gemm(Quantised(a.values[:0], a.scales[:0]), quantise_rows_reference(normal(8, 256))).shape == (0, 8)


@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
@pytest.mark.parametrize("backend", ["triton", "emulate"])
def test_operation_is_registered_as_torch_wants(backend, in_blocks):
    a = quantise_rows_reference(normal(20, 144))
    b = (quantise_blocks_reference if in_blocks else quantise_rows_reference)(normal(24, 144, seed=1))
    operation = torch.ops.lit_kernels.fp8_gemm.default
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operation, (*a, *b, torch.bfloat16, in_blocks, backend), test_utils=utilities)
    before = [one.clone() for one in (*a, *b)]  # test_schema compares its inputs, which torch cannot in FP8 on a CPU
    found = operation(*a, *b, torch.float32, in_blocks, backend)
    assert all(torch.equal(one.float(), old.float()) for one, old in zip((*a, *b), before, strict=True))
    torch.testing.assert_close(found, gemm_reference(a, b, torch.float32), rtol=1e-5, atol=1e-5)
