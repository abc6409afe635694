"""The cache of a transformers model while the builtin engine drives it: slot s of a row holds its token at position s.

transformers' own caches append, so that a right-padded row would keep its padding between prompt and answer, and a
sliding window, which is counted in slots, would be cut short by it. Here a row's first answer token takes the place of
its first pad; masks then say in positions what each layer may see.

Left out: dropping what a sliding window has left behind; every layer keeps all positions.

Shapes: B rows, H key heads, S slots, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lit_reason.models.cache import SLOTS

FULL, SLIDING = "full_attention", "sliding_attention"


class PositionLayer(CacheLayerMixin):
    """`keys` and `values` (B, H, S, d) of one layer."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(
        self, key_states: Tensor, value_states: Tensor, position_B: Tensor | None = None, slots: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Everything so far, with these: whole prompts when `position_B` is None, else one token per row."""
        if position_B is None or self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        row = torch.arange(len(position_B), device=position_B.device)
        self.keys, self.values = _widened(self.keys, slots), _widened(self.values, slots)
        self.keys[row, :, position_B] = key_states[:, :, 0]
        self.values[row, :, position_B] = value_states[:, :, 0]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(query_length, self.get_seq_length()), 0

    def get_max_length(self) -> int:
        return -1


class PositionCache(Cache):
    """Empty until a prefill gives it rows."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PositionLayer)
        self._position_B: Tensor | None = None
        self._slots = 0

    def at(self, position_B: Tensor) -> int:
        """The next forward brings one token per row, at these positions. S after it."""
        length = max(int(position_B.max()) + 1, self.get_seq_length())
        self._position_B, self._slots = position_B, -(-length // SLOTS) * SLOTS
        return self._slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return super().update(key_states, value_states, layer_idx, self._position_B, self._slots)

    def select(self, rows: Tensor) -> None:
        """Keeps (or repeats) these rows: drops finished ones, or fans a shared prompt out."""
        for layer in self.layers:
            assert isinstance(layer, PositionLayer)
            layer.reorder_cache(rows)  # type: ignore[arg-type]

    def join(self, other: PositionCache) -> None:
        """Takes the rows of another cache in, behind its own."""
        for mine, more in zip(self.layers, other.layers, strict=True):
            assert isinstance(mine, PositionLayer) and isinstance(more, PositionLayer)
            slots = max(mine.get_seq_length(), more.get_seq_length())
            assert (
                mine.keys is not None and mine.values is not None and more.keys is not None and more.values is not None
            )
            mine.keys = torch.cat((_widened(mine.keys, slots), _widened(more.keys, slots)))
            mine.values = torch.cat((_widened(mine.values, slots), _widened(more.values, slots)))


def decode_mask(
    kinds: Sequence[str], window: int | None, position_B: Tensor, slots: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What a token at `position_B` sees, added to the scores: (B, 1, 1, S), or one for each kind of layer.

    full_attention       slots 0 .. position
    sliding_attention    the last `window` of them, its own included

    Args:
        kinds: the model's kinds of layers; a single one needs no dict.
    """
    slot_S = torch.arange(slots, device=position_B.device)
    past_BS = slot_S <= position_B[:, None]
    seen = {FULL: past_BS}
    if window is not None:
        seen[SLIDING] = past_BS & (slot_S > position_B[:, None] - window)
    masks = {
        kind: torch.zeros(past_BS.shape, dtype=dtype, device=slot_S.device)
        .masked_fill_(~seen[kind], torch.finfo(dtype).min)
        .view(-1, 1, 1, slots)
        for kind in kinds
    }
    return masks if len(masks) > 1 else masks[kinds[0]]


def _widened(x_BHSd: Tensor, slots: int) -> Tensor:
    missing = slots - x_BHSd.shape[2]
    return F.pad(x_BHSd, (0, 0, 0, missing)) if missing > 0 else x_BHSd
