"""A training dataloader whose whole state is four integers, so that a run resumes in the middle of an epoch exactly.

Lightning saves and restores any train dataloader that has `state_dict` / `load_state_dict`, and fetches nothing ahead
from one that has `__len__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lit_reason.data.cursor import check_size, epoch_order
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import TokenBatch

Collate = Callable[[Sequence[int]], TokenBatch]


class CursorLoader:
    """Batches of shuffled items: one pass gives `len(loader)` batches from where the cursor stands.

    Every batch is full: the few items that do not fill one are left out of this epoch (each epoch has another order).
    A pass that is left early (`break`, `limit_train_batches`, a resumed run) does not start the epoch anew: the next
    pass goes on behind the last batch handed out, and on into the next epoch.

    Args:
        size: number of items.
        collate: makes the batch of a list of item numbers.
        batch_size: items per batch and rank; with fewer items than that in all, the one batch holds them all.
        seed: of the order; the state's seed replaces it on `load_state_dict`.
        shuffle: False visits the items in order.
        rank, world_size: this process deals itself every `world_size`-th batch; the state is the same on every rank.
    """

    def __init__(
        self,
        size: int,
        collate: Collate,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"got batch_size={batch_size}; give an integer >= 1")
        if size < world_size:
            raise DataError(f"{size} training examples for {world_size} processes; give at least one for each")
        self.size, self.collate, self.shuffle = size, collate, shuffle
        self.batch_size = min(batch_size, size // world_size)
        self.rank, self.world_size = rank, world_size
        self.epoch, self.index, self.seed = 0, 0, seed

    def __len__(self) -> int:
        """Batches per epoch, constant."""
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        order = None
        for _ in range(len(self)):
            if self.index >= len(self):
                self.epoch, self.index, order = self.epoch + 1, 0, None
            if order is None:
                order = epoch_order(self.size, self.seed, self.epoch, self.shuffle)
            start = (self.index * self.world_size + self.rank) * self.batch_size
            # counted before it is handed out: a checkpoint taken while this batch trains must not repeat it
            self.index += 1
            yield self.collate(order[start : start + self.batch_size].tolist())

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "seed": self.seed, "size": self.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        check_size(state, self.size, "examples")
        self.epoch, self.index, self.seed = int(state["epoch"]), int(state["index"]), int(state["seed"])


def text_batch(rows_NT: Tensor, items: Sequence[int]) -> TokenBatch:
    """Packed rows (N, T+1) -> inputs, targets (B, T); every target counts."""
    rows_BT = rows_NT[torch.as_tensor(items)]
    targets_BT = rows_BT[:, 1:].contiguous()
    return TokenBatch(rows_BT[:, :-1].contiguous(), targets_BT, torch.ones(targets_BT.shape))


def pair_batch(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> TokenBatch:
    """(prompt ids, completion ids) pairs -> one batch padded on the right; only completion tokens count.

    Example: prompt `[7, 8]`, completion `[5, 6]` -> inputs `[7, 8, 5]`, targets `[8, 5, 6]`, mask `[0, 1, 1]`.
    """
    length = max(len(prompt) + len(completion) for prompt, completion in pairs) - 1
    inputs_BT = torch.full((len(pairs), length), pad_id)
    targets_BT = torch.full((len(pairs), length), pad_id)
    mask_BT = torch.zeros(len(pairs), length)
    for b, (prompt, completion) in enumerate(pairs):
        ids = torch.tensor(prompt + completion)
        inputs_BT[b, : len(ids) - 1] = ids[:-1]
        targets_BT[b, : len(ids) - 1] = ids[1:]
        mask_BT[b, len(prompt) - 1 : len(ids) - 1] = 1.0
    return TokenBatch(inputs_BT, targets_BT, mask_BT)
