"""A function of a head's logits, some rows at a time, so that the logits of all rows never exist at once.

Shapes: M targets, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS = 2**25  # the most logits of one tensor: 128 MiB in float32


def row_chunk(head: nn.Module, states_MD: Tensor) -> int:
    """How many rows may have logits at once; all M where they are few, and at least one."""
    vocabulary = getattr(head, "out_features", None)
    if not isinstance(vocabulary, int):
        with torch.no_grad():
            vocabulary = head(states_MD[:0]).shape[-1]
    rows = max(LOGITS // max(vocabulary, 1), 1)
    return max(len(states_MD), 1) if len(states_MD) <= rows else rows


def by_rows(function: Callable[..., tuple[Tensor, ...]], rows: int, *tensors_M: Tensor) -> tuple[Tensor, ...]:
    """`function` of `rows` rows of the tensors at a time, its results joined. With several chunks, each is computed
    again in the backward pass.

    Trap: the chunks' gradients of a parameter are added in the parameter's dtype, so a trained bfloat16 one loses
    small shares; float32 parameters under autocast do not.
    """
    if len(tensors_M[0]) <= rows:
        return function(*tensors_M)
    parts = [
        checkpoint(_with_own_casts, function, *chunk, use_reentrant=False)
        for chunk in zip(*(tensor_M.split(rows) for tensor_M in tensors_M), strict=True)
    ]
    return tuple(torch.cat(part_M) for part_M in zip(*parts, strict=True))


def _with_own_casts(function: Callable[..., tuple[Tensor, ...]], *chunk: Tensor) -> tuple[Tensor, ...]:
    """Autocast would share one cast of a weight between chunks and add their gradients to it in bfloat16."""
    kind = chunk[0].device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype=dtype, enabled=on, cache_enabled=False):
        return function(*chunk)
