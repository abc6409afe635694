"""Several processes that share a round: each does its part of the work, and all know the whole of its result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import distributed

from lit_reason.errors import RolloutError


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def share(items: Sequence[Any]) -> list[Any]:
    """This rank's items: every `size`-th, from its own number on."""
    rank, size = rank_and_size()
    return list(items[rank::size])


@contextmanager
def all_or_none() -> Iterator[None]:
    """If the block fails on one rank, all raise: the others would wait for it until a collective times out."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if rank_and_size()[1] > 1:
        told: list[Any] = [None] * rank_and_size()[1]
        distributed.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if failed and error is None:
            raise RolloutError(f"process {failed[0][0]} failed, and with it the round: {failed[0][1]}")
    if error is not None:
        raise error


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
