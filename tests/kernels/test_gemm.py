"""The FP8 product emulated, what each implementation is given, and what is refused."""

import pytest
import torch
from lit_kernels import gemm as module
from lit_kernels.dispatch import UnsupportedError, interpreted
from lit_kernels.fp8 import Quantised, dequantise_blocks, dequantise_rows
from lit_kernels.gemm import gemm
from lit_kernels.quantise import quantise_blocks, quantise_rows
from torch._subclasses.fake_tensor import FakeTensorMode


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
def test_emulated_sums_are_those_of_the_dequantised_operands(kind, in_blocks):
    a = quantise_rows(normal(150, 272) * torch.exp(normal(150, 1, seed=1)), kind)
    b = (quantise_blocks if in_blocks else quantise_rows)(normal(144, 272, seed=2), kind)
    exact = dequantise_rows(a).double() @ (dequantise_blocks if in_blocks else dequantise_rows)(b).double().t()
    with torch.autocast("cpu", torch.bfloat16):  # of no concern to the product
        assert error(gemm(a, b, torch.float32, "emulate"), exact) < 1e-6  # float32 sums
    assert error(gemm(a, b, torch.bfloat16, "emulate"), exact) < 2e-3  # one rounding: 2**-9 at most


def test_bfloat16_holds_what_power_of_two_scales_give():
    """So that a CPU may multiply in bfloat16 and sum in float32."""
    a = quantise_rows(normal(64, 256) * torch.exp(8 * normal(64, 1, seed=1)), "power of two")
    wide = dequantise_rows(a)
    assert torch.equal(wide.bfloat16().float(), wide)
    assert module._are_powers_of_two(a.scales) and not module._are_powers_of_two(quantise_rows(normal(4, 256)).scales)
    before = torch.backends.mkldnn.matmul.fp32_precision
    gemm(a, a, torch.float32, "emulate")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize(("M", "N", "K"), [(256, 384, 640), (128, 128, 128), (16, 256, 1024)])
@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
def test_layouts_are_those_that_torch_checks(M, N, K, in_blocks):
    """Its shape function, which runs without a GPU, checks shapes and strides of the scales."""
    with FakeTensorMode(), torch.device("cuda"):
        a, b = (torch.empty(n, K, dtype=torch.float8_e4m3fn) for n in (M, N))
        scales = torch.empty(N // 128, K // 128) if in_blocks else torch.empty(K // 128, N).t()
        out = module._by_cublas(a, torch.empty(K // 128, M).t(), b, scales, torch.bfloat16, in_blocks)
    assert out.shape == (M, N) and out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "cuda", "shape", "backend", "expected"),
    [
        ((9, 0), "13.0", (64, 128, 128), "auto", "torch"),
        ((9, 0), "13.0", (64, 128, 136), "auto", "triton"),
        ((9, 0), "12.8", (64, 128, 128), "auto", "triton"),
        ((10, 0), "13.0", (64, 128, 128), "auto", "triton"),
        ((10, 0), "13.0", (64, 128, 128), "torch", "compute capability 9.0, not 10.0"),
        ((9, 0), "12.8", (64, 128, 128), "torch", "need CUDA 12.9"),
        ((8, 0), "13.0", (64, 128, 128), "triton", "8.0 has no FP8 product"),
        ((8, 0), "13.0", (64, 128, 128), "auto", "8.0 has no FP8 product"),
    ],
)
def test_which_runs_on_a_gpu(monkeypatch, capability, cuda, shape, backend, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if expected in ("torch", "triton"):
        assert module._chosen(backend, torch.device("cuda"), shape) == expected
    else:
        with pytest.raises(UnsupportedError, match=expected):
            module._chosen(backend, torch.device("cuda"), shape)


def test_nothing_is_emulated_unasked():
    a = quantise_rows(normal(16, 128))
    with pytest.raises(UnsupportedError, match="Type backend='emulate'"):
        gemm(a, a)
    with pytest.raises(UnsupportedError, match="no product with block scales on a cpu"):
        gemm(a, a, backend="torch")
    if not interpreted():
        with pytest.raises(UnsupportedError, match="do not run on a cpu"):
            gemm(a, a, backend="triton")
    with pytest.raises(ValueError, match="got backend='cutlass'; valid: auto, torch, triton"):
        gemm(a, a, backend="cutlass")


def test_what_does_not_fit_is_refused():
    a, b = quantise_rows(normal(4, 256)), quantise_rows(normal(8, 128))
    with pytest.raises(ValueError, match=r"got a \(4, 256\) with scales \(4, 2\) and b \(8, 128\).*valid: \(M, K\)"):
        gemm(a, b, backend="emulate")
    with pytest.raises(ValueError, match="valid:"):
        gemm(a, Quantised(normal(8, 256).to(a.values.dtype), torch.ones(8, 1)), backend="emulate")
