"""Results of two ways beside each other, in chunks: some have more bytes than their float64 would leave room for.

Needs torch only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 26  # numbers at a time
IDENTICAL = 200.0  # dB: what stands for infinity, which JSON has not

Checks = dict[str, float | bool]


def tensors(result: Any) -> list[Tensor]:
    """Of nested tuples, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [one for part in result or () for one in tensors(part)]


def same(a: Any, b: Any) -> bool:
    """Whether all bits of two results are."""
    ours, theirs = tensors(a), tensors(b)
    return len(ours) == len(theirs) and all(_same(x, y) for x, y in zip(ours, theirs, strict=True))


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    chunks = zip(_chunks(x), _chunks(y), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in chunks)


def exact(result: Any, reference: Any) -> Checks:
    return {"exact": same(result, reference)}


def closeness(result: Any, reference: Any) -> Checks:
    """Of the worst tensor: `diff` = 1 - 2<x,y> / (|x|^2 + |y|^2), `sqnr` = 10 log10(|x|^2 / |x - y|^2) in dB, of a
    result y and its reference x. NaN where either has one, or shapes differ."""
    each = [_closeness(y, x) for y, x in zip(tensors(result), tensors(reference), strict=True)]
    return {"diff": _worst(max, [one[0] for one in each]), "sqnr": _worst(min, [one[1] for one in each])}


def _closeness(y: Tensor, x: Tensor) -> tuple[float, float]:
    if x.shape != y.shape:
        return math.nan, math.nan
    sums = torch.zeros(4, dtype=torch.float64, device=x.device)
    for a, b in zip(_chunks(x), _chunks(y), strict=True):
        a, b = a.double(), b.double()
        sums += torch.stack([a @ a, b @ b, a @ b, (a - b) @ (a - b)])
    xx, yy, xy, error = sums.tolist()
    if math.isnan(error):
        return math.nan, math.nan
    return 1 - 2 * xy / (xx + yy) if xx + yy else 0.0, 10 * math.log10(xx / error) if xx and error else IDENTICAL


def _worst(of: Callable[[list[float]], float], values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else of(values)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.detach().contiguous().view(-1).split(CHUNK)
