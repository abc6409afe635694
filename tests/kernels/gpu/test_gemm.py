"""The FP8 products on a GPU: ours in every form, and cuBLAS's, against the dequantised operands."""

import pytest
import torch
from lit_kernels.fp8 import gemm_reference, quantise_blocks_reference, quantise_rows_reference
from lit_kernels.gemm import gemm, missing_for_torch

kernels = pytest.importorskip("lit_kernels.gpu.gemm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SHAPES = [(4096, 2112, 7168), (4096, 7168, 2048), (1000, 144, 4112)]
MOST = 1e-3  # Hopper's tensor cores sum 128 products with about 14 bits


def problem(M, N, K, in_blocks):
    torch.manual_seed(0)
    quantise = quantise_blocks_reference if in_blocks else quantise_rows_reference
    a, b = torch.randn(M, K, device="cuda"), torch.randn(N, K, device="cuda")
    return quantise_rows_reference(a), quantise(b)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["auto", "pointers", *kernels.LAUNCHES])
def test_every_form_and_from_run_to_run(form, shape, in_blocks):
    if form in kernels.LAUNCHES and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the persistent forms are for compute capability 9.0")
    a, b = problem(*shape, in_blocks)
    found = kernels.gemm(a, b, torch.float32, form)
    assert error(found, gemm_reference(a, b, torch.float64)) < MOST
    for _ in range(20):  # a race of the pipeline shows in some runs only
        assert torch.equal(kernels.gemm(a, b, torch.float32, form), found)


@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cublas_takes_the_same_operands(shape, in_blocks):
    if reason := missing_for_torch(torch.device("cuda"), *shape[1:]):
        pytest.skip(reason)
    a, b = problem(*shape, in_blocks)
    found, ours = (gemm(a, b, torch.bfloat16, backend) for backend in ("torch", "triton"))
    assert error(found, gemm_reference(a, b, torch.float64)) < 3e-3  # and a rounding to bfloat16
    assert error(found, ours.double()) < 4e-3
