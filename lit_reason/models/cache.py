"""The cache of multi-head latent attention: per token and layer one latent and one rotary key, nothing per head.

Shapes: B rows, S positions, C = kv_lora_rank + qk_rope_head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_reason.models.config import ModelConfig

SLOTS = 16  # positions are read in multiples of this, so that decoding meets few shapes (see `layers.round_up`)


class LatentCache:
    """Latents of B sequences. `layers[l]` is (B, S, C): the normalised latent first, then the rotated key. First the
    trunk's layers, then, with `draft`, that of the first multi-token-prediction module.

    Args:
        config: the model's shape.
        rows: B.
        capacity: positions to begin with (tokens); S is this rounded up to a multiple of `SLOTS`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        *,
        draft: bool = False,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        capacity = -(-capacity // SLOTS) * SLOTS
        channels = config.kv_lora_rank + config.qk_rope_head_dim
        self.layers: list[Tensor] = [
            torch.zeros(rows, capacity, channels, dtype=dtype, device=device) for _ in range(config.depth + draft)
        ]

    @property
    def rows(self) -> int:
        return self.layers[0].shape[0]

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` positions. S stays as small as it may be, so that decoding reads whole tensors:
        the CPU's batched products copy a slice first."""
        missing = -(-capacity // SLOTS) * SLOTS - self.layers[0].shape[1]
        if missing > 0:
            self.layers = [F.pad(layer, (0, 0, 0, missing)) for layer in self.layers]

    def select(self, index_B: Tensor) -> None:
        """Keeps (or repeats) the rows of `index_B`: drops finished rows, or fans a shared prefix out."""
        self.layers = [layer.index_select(0, index_B) for layer in self.layers]

    def bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)
