"""The kernels that quantise against the reference, bit by bit."""

import math

import pytest
import torch
from lit_kernels.fp8 import (
    E4M3,
    dequantise_blocks,
    dequantise_rows,
    quantise_blocks_reference,
    quantise_both_reference,
    quantise_rows_reference,
)
from lit_kernels.quantise import quantise_blocks, quantise_both, quantise_rows

quantise = pytest.importorskip("lit_kernels.gpu.quantise")
SHAPES = [(128, 128), (256, 384), (100, 200), (1, 16), (130, 7)]
KINDS = ["float", "power of two"]


def sample(shape, dtype=torch.bfloat16, seed=0):
    """Blocks of very different size, some of zeros, some of numbers far below what a scale can be."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape[0], 1, generator=generator))
    x[shape[0] // 3] = 0
    x[shape[0] // 2] *= 1e-20
    return x.to(dtype)


def same(found, expected):
    assert found.values.dtype == E4M3 and found.scales.dtype == torch.float32
    assert found.values.is_contiguous() and found.scales.shape == expected.scales.shape
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_the_references(shape, dtype, kind):
    x = sample(shape, dtype)
    same(quantise.quantise_rows(x, kind), quantise_rows_reference(x, kind))
    same(quantise.quantise_blocks(x, kind), quantise_blocks_reference(x, kind))
    same(quantise.quantise_blocks(x, kind, transposed=True), quantise_blocks_reference(x.t(), kind))
    for found, expected in zip(quantise.quantise_both(x, kind), quantise_both_reference(x, kind), strict=True):
        same(found, expected)


def test_rows_that_are_not_neighbours_and_none_at_all():
    wide = sample((64, 512))
    same(quantise.quantise_rows(wide[::2, 128:256]), quantise_rows_reference(wide[::2, 128:256]))
    assert quantise.quantise_rows(wide).scales.stride() == quantise_rows_reference(wide).scales.stride() == (1, 64)
    for shape in ((0, 128), (4, 0)):
        empty = torch.empty(shape, dtype=torch.bfloat16)
        assert quantise.quantise_rows(empty).values.shape == shape
    with pytest.raises(ValueError, match=r"valid: two dimensions, the last one contiguous.*Type x\.reshape"):
        quantise.quantise_rows(wide.t())


def test_what_is_not_a_number_stays_visible():
    x = sample((4, 256))
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    found, expected = quantise.quantise_rows(x), quantise_rows_reference(x)
    for one in (found, expected):
        wide = dequantise_rows(one)
        assert wide[1].isnan().nonzero().flatten().tolist() == [3]
        assert wide[2, 128:].isnan().all() and wide[2, :128].isfinite().all()
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize(("kind", "within_db"), [("power of two", 0.1), ("float", 0.5)])
def test_how_much_is_lost(kind, within_db):
    """E4M3 keeps 3 bits of a mantissa: between 2**e and 2**(e+1) its numbers are 2**(e-3) apart, and the error's mean
    square is a twelfth of that one's. Of a normal sample the shares of the octaves are known; a scale that is a power
    of two keeps them, any other one shifts them."""

    def within(size):
        return math.erf(size / math.sqrt(2))

    error = sum(2.0 ** (2 * e - 6) / 12 * (within(2.0 ** (e + 1)) - within(2.0**e)) for e in range(-9, 4))
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    rows, blocks = quantise_rows_reference(x, kind), quantise_blocks_reference(x, kind)
    for wide in (dequantise_rows(rows), dequantise_blocks(blocks)):
        found_db = 10 * torch.log10(x.square().sum() / (x - wide).square().sum())
        assert abs(found_db + 10 * math.log10(error)) < within_db


def test_scales_that_are_powers_of_two_are_never_too_small():
    x = sample((64, 256), torch.float32)
    float_, power = quantise_rows_reference(x), quantise_rows_reference(x, "power of two")
    mantissa, _ = torch.frexp(power.scales)
    assert (mantissa == 0.5).all()
    ratio = power.scales / float_.scales
    assert (ratio >= 1).all() and (ratio < 2).all()


@pytest.mark.parametrize("shape", [(130, 200), (0, 128), (4, 0)], ids=str)
def test_operations_are_registered_as_torch_wants(shape):
    x = sample(shape) if 0 not in shape else torch.empty(shape, dtype=torch.bfloat16)
    ops = torch.ops.lit_kernels
    for op, arguments in (
        (ops.quantise_rows, ("float",)),
        (ops.quantise_blocks, ("float", False)),
        (ops.quantise_blocks, ("power of two", True)),
        (ops.quantise_both, ("float",)),
    ):
        torch.library.opcheck(op.default, (x, *arguments))


def test_functions_take_the_kernels_when_asked_and_overwrite_everything(monkeypatch):
    x = sample((130, 200))
    expected = (
        quantise_rows(x, "float", "torch"),
        quantise_blocks(x, "float", "torch", transposed=True),
        *quantise_both(x, "float", "torch"),
    )
    real, made = torch.Tensor.new_empty, []

    def poisoned(*arguments, **settings):
        made.append(real(*arguments, **settings).fill_(float("nan")))
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    found = (
        quantise_rows(x, "float", "triton"),
        quantise_blocks(x, "float", "triton", transposed=True),
        *quantise_both(x, "float", "triton"),
    )
    assert len(made) >= 8  # two of each
    for one, right in zip(found, expected, strict=True):
        same(one, right)
        assert one.scales.stride() == right.scales.stride()
