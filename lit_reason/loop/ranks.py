"""Several processes that share a round: each does its part of the work, and all know the whole of its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import distributed


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share(items: Sequence[Any]) -> list[Any]:
    """This rank's items: every `size`-th, from its own number on."""
    rank, size = rank_and_size()
    return list(items[rank::size])


def gather(mine: Sequence[Any]) -> list[Any]:
    """The whole list of which every rank made its `share`, in order, on every rank. Records travel pickled."""
    size = rank_and_size()[1]
    if size == 1:
        return list(mine)
    parts: list[Any] = [None] * size
    distributed.all_gather_object(parts, list(mine))
    whole: list[Any] = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank::size] = part
    return whole
