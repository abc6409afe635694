"""Quantising in plain torch, and what is refused. The reference's own numbers: interpreted/test_quantise.py."""

import pytest
import torch
from lit_kernels.dispatch import UnsupportedError, interpreted
from lit_kernels.fp8 import E4M3, dequantise_blocks, dequantise_rows, quantise_rows_reference, widened
from lit_kernels.quantise import quantise_blocks, quantise_both, quantise_rows


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_all_numbers_of_e4m3_are_widened_as_torch_does():
    values = torch.arange(256, dtype=torch.uint8).view(E4M3)
    found, expected = widened(values), values.float()
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().sum() == 2
    assert torch.equal(found.nan_to_num(), expected.nan_to_num()) and found.dtype == torch.float32
    assert torch.equal(widened(values.view(16, 16).t()).nan_to_num(), expected.view(16, 16).t().nan_to_num())


def test_half_a_step_of_e4m3_at_most():
    """Of 3 bits behind the point: an error below 2**-4 of a number, or of a scale's subnormals below 2**-10."""
    x = normal(130, 200)
    for q, wide in ((quantise_rows(x), dequantise_rows), (quantise_blocks(x), dequantise_blocks)):
        step = wide(q._replace(values=torch.ones_like(q.values, dtype=torch.float32).to(E4M3)))  # the scales
        assert ((wide(q) - x).abs() <= torch.maximum(x.abs() * 2**-4, step * 2**-10) * (1 + 1e-6)).all()


def test_both_are_rows_and_rows_of_the_transpose():
    x = normal(130, 72)
    for found, expected in zip(
        quantise_both(x), (quantise_rows_reference(x), quantise_rows_reference(x.t())), strict=True
    ):
        assert torch.equal(found.values.float(), expected.values.float()) and torch.equal(found.scales, expected.scales)
        assert found.scales.stride() == expected.scales.stride() and found.values.is_contiguous()


@pytest.mark.parametrize("kind", ["float", "power of two"])
def test_blocks_of_the_transpose_are_the_same_numbers(kind):
    w = normal(200, 336)
    q, q_t = quantise_blocks(w, kind), quantise_blocks(w, kind, transposed=True)
    assert torch.equal(q_t.values.float(), q.values.float().t()) and torch.equal(q_t.scales, q.scales.t())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 4\); valid: two dimensions. Type x\.reshape"):
        quantise_rows(torch.zeros(2, 3, 4))
    if not interpreted():
        with pytest.raises(UnsupportedError, match="do not run on a cpu"):
            quantise_both(torch.zeros(4, 4), backend="triton")
