"""One decoder block, of the trunk or of a multi-token-prediction module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_reason.models.attention import Attend
from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import RMSNorm, SwiGLU
from lit_reason.models.mla import MLA
from lit_reason.models.moe import MoE


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each branch scaled by `scale`: in the trunk 1/m_L (CompleteP,
    2505.01618)."""

    def __init__(self, config: ModelConfig, dense: bool, scale: float) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = MLA(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = SwiGLU(config.width, config.ffn_width) if dense else MoE(config)
        self.scale = scale

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        attend: Attend,
        cache: Tensor | None = None,
        valid: Tensor | None = None,
        experts_NK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x = torch.add(x, self.attn(self.attn_norm(x), rotation, attend, cache), alpha=self.scale)
        return self._feed_forward(x, valid, experts_NK)

    def decode(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The newest tokens; `attention` is the attention layer's `decode` at their positions."""
        x = torch.add(x, attention(self.attn_norm(x)), alpha=self.scale)
        return self._feed_forward(x, None)[0]

    def _feed_forward(
        self, x: Tensor, valid: Tensor | None, experts_NK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.ffn_norm(x)
        out, balance = self.ffn(normed, valid, experts_NK) if isinstance(self.ffn, MoE) else (self.ffn(normed), None)
        return torch.add(x, out, alpha=self.scale), balance
