"""What training and generation ask of a language model, ours or an adapter of somebody else's."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn


class Cache(Protocol):
    """Keys and values of the rows that are being generated."""

    def select(self, rows: Tensor) -> None:
        """Keeps these rows (int64 indices), in this order; a row may be named several times."""
        ...

    def join(self, other: Self) -> None:
        """Takes the rows of another cache in, behind its own."""
        ...


@runtime_checkable
class CausalLM(Protocol):
    """A causal language model in two halves, trunk and head, with prefill and decode.

    Shapes: B rows, T positions, M targets that count, D width, V vocabulary, L MoE layers, K experts per token.

    Attributes:
        config: has `max_seq_len` and `vocab_size`.
        head: maps states to logits (..., D) -> (..., V).
    """

    @property
    def config(self) -> Any: ...

    @property
    def head(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    def states_at(self, input_ids_BT: Tensor, counts_BT: Tensor, experts_BTLK: Tensor | None = None) -> Tensor:
        """states_MD that the head reads to predict the targets that count, in row-major order; right-padded rows.

        `experts_BTLK` (`PolicyBatch`) are replayed where they are not -1; a model that cannot says so and goes on.
        """
        ...

    def new_cache(self, rows: int, capacity: int) -> Any: ...

    def prefill(self, input_ids_BT: Tensor, length_B: Tensor, cache: Any) -> Tensor:
        """Reads right-padded prompts of `length_B` tokens into the cache; logits_BV of each row's last token."""
        ...

    def decode(self, token_B: Tensor, position_B: Tensor, cache: Any) -> Tensor:
        """One token per row at `position_B`; logits_BV of the next."""
        ...

    def routers(self) -> list[Any]:
        """The routers whose load is balanced without a loss; none in a model that has no such."""
        ...
