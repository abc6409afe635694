"""The cache of multi-head latent attention: per token and layer one latent and one rotary key, nothing per head.

Shapes: B rows, S positions, C = kv_lora_rank + qk_rope_head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_reason.models.config import ModelConfig

SLOTS = 16  # positions are read in multiples of this, so that decoding meets few shapes (`lit_kernels.sizes.round_up`)


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


class Cursor:
    """Where each row of a decode step stands, and how it attends.

    Args:
        position_BK: int64, the positions that the new tokens take in their row.
        cache: grows to hold them.
        heads: H; a row has Q = K H queries, or one mask for all where K = 1.
    """

    def __init__(self, position_BK: Tensor, cache: LatentCache, heads: int) -> None:
        cache.grow(int(position_BK.max()) + 1)
        latents_BSC = cache.layers[0]
        device, S = position_BK.device, latents_BSC.shape[1]
        self.position_BK, self.cache = position_BK, cache
        self.row_B1 = torch.arange(position_BK.shape[0], device=device)[:, None]
        bias_BKS = torch.zeros(*position_BK.shape, S, dtype=latents_BSC.dtype, device=device)
        bias_BKS.masked_fill_(torch.arange(S, device=device) > position_BK[..., None], float("-inf"))
        self.bias_BQS = bias_BKS if position_BK.shape[1] == 1 else bias_BKS.repeat_interleave(heads, dim=1)

    def attend(self, layer: int, q_THC: Tensor, new_BKC: Tensor) -> Tensor:
        """Writes the new latents, then attends to everything up to each token itself; out_THC."""
        cache_BSC = self.cache.layers[layer]
        cache_BSC[self.row_B1, self.position_BK] = new_BKC.to(cache_BSC.dtype)
        q_BQC = q_THC.reshape(len(cache_BSC), -1, q_THC.shape[-1])
        weights_BQS = torch.baddbmm(self.bias_BQS, q_BQC, cache_BSC.transpose(1, 2)).softmax(-1)
        # Over the rotary part too, whose sum is dropped: a slice of the cache would be copied at every step.
        return torch.bmm(weights_BQS, cache_BSC).view(q_THC.shape)
