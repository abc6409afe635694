"""Rows in chunks: how many, and that no chunk is kept."""

import pytest
import torch
from lit_kernels.logprobs import LARGE_TILE, TILE
from torch import nn

from lit_reason.modules import chunked
from lit_reason.modules.chunked import by_rows, row_chunk


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 1), (10, 10), (11, 10)],  # 100 logits at once, 10 to a row
)
def test_few_rows_stay_together(monkeypatch, rows, expected):
    monkeypatch.setattr(chunked, "LOGITS", 109)
    states = torch.zeros(rows, 4)
    assert row_chunk(nn.Linear(4, 10), states) == row_chunk(nn.Sequential(nn.Linear(4, 10)), states) == expected


def test_a_vocabulary_above_the_limit_goes_row_by_row(monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 9)
    assert row_chunk(nn.Linear(4, 10), torch.zeros(3, 4)) == 1


def test_a_tile_is_within_the_limit():
    assert all(R * C <= chunked.LOGITS for R, C in (*TILE.values(), LARGE_TILE))


def test_each_chunk_is_computed_again_and_only_then():
    rows = []

    def double(x_MD):
        rows.append(len(x_MD))
        return (2 * x_MD.exp(),)

    x = torch.zeros(5, 1, requires_grad=True)
    out = by_rows(double, 2, x)[0]
    assert rows == [2, 2, 1]
    out.sum().backward()
    assert rows == [2, 2, 1] + [1, 2, 2]
    assert x.grad.tolist() == [[2.0]] * 5


def test_under_autocast_the_chunks_gradients_of_a_weight_are_added_in_float32():
    """2048 shares of 1: a bfloat16 sum would stop growing at 256."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        by_rows(lambda x_MD: (layer(x_MD),), 1, torch.ones(2048, 1))[0].sum().backward()
    assert layer.weight.grad.item() == 2048
