"""Multi-token prediction (DeepSeek-V3, 2412.19437 eq. 21-25): blocks after the trunk that look one token further each.

    h_i (the trunk's output), t_{i+1}  ->  module 1  ->  t_{i+2}
    module 1's output,        t_{i+2}  ->  module 2  ->  t_{i+3}

Embedding and head are the trunk's own. Where the paper writes [h; emb], the released weights have
[enorm(emb), hnorm(h)], and so has this. Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lit_reason.models.attention import Attend
from lit_reason.models.block import Block
from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import RMSNorm
from lit_reason.models.mla import AttendLatents


class MTPModule(nn.Module):
    """One depth of multi-token prediction.

    Its block's branches are not scaled by 1/m_L: there is one such block whatever the trunk's depth, so nothing adds
    up over depth.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.width, config.norm_eps)
        self.hnorm = RMSNorm(config.width, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.width, config.width, bias=False)
        self.block = Block(config, dense=config.moe_layers == 0, scale=1.0)
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        states: Tensor,
        embedded: Tensor,
        rotation: Tensor,
        attend: Attend,
        cache: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """States that predict one token further, normalised for the head, and the block's balance loss.

        Args:
            states: (B, T, D), what the head reads at the depth before: h_i.
            embedded: (B, T, D), the embedding of the token that the depth before predicts: t_{i+1}.
            rotation, attend, cache, valid: as in `Block`.
        """
        x, balance = self.block(self._join(states, embedded), rotation, attend, cache, valid)
        return self.norm(x), balance

    def decode(self, states: Tensor, embedded: Tensor, rotation: Tensor, attend: AttendLatents) -> Tensor:
        """The same states for a few tokens (B, K, D), the others read from the cache."""
        attention = partial(self.block.attn.decode, rotation_BKR=rotation, attend=attend)
        return self.norm(self.block.decode(self._join(states, embedded), attention))

    def _join(self, states: Tensor, embedded: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(states)), dim=-1))
