"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1). Shapes: B rows, T tokens, H heads, S cached
positions; N, R, Dv = qk_nope, qk_rope and v head dims; C = kv_lora_rank, the latent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError
from lit_reason.models.attention import Attend
from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import RMSNorm
from lit_reason.models.rope import apply_rope, softmax_scale

# (q_THC, new_BKC) -> out_THC: scaled queries and the K newest latents of B rows, T = B K; C holds the rotary key, too,
# whose part of the output means nothing.
AttendLatents = Callable[[Tensor, Tensor], Tensor]


class MLA(nn.Module):
    """Attention whose keys and values are expanded from one latent per token.

    Training and prefill expand the latent into per-head keys and values; decoding absorbs `kv_b` into the query and
    the output, so that it reads only the latents. Both are the same function (2405.04434 eq. 9-19).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.scale = softmax_scale(config)
        width, q_out = config.width, config.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q = nn.Linear(width, q_out, bias=False)
        else:
            self.q = nn.Sequential(
                nn.Linear(width, config.q_lora_rank, bias=False),
                RMSNorm(config.q_lora_rank, config.latent_eps),
                nn.Linear(config.q_lora_rank, q_out, bias=False),
            )
        self.kv_a = nn.Linear(width, self.latent + self.rope, bias=False)
        self.kv_norm = RMSNorm(self.latent, config.latent_eps)
        self.kv_b = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.out = nn.Linear(self.heads * self.value, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend, cache_BSC: Tensor | None = None) -> Tensor:
        """Attention among the tokens of a batch.

        Args:
            x: (B, T, D), or (N, D) packed.
            rotation: rotations of the tokens' positions, broadcastable to (*tokens, R/2).
            attend: which token sees which (`attention.causal`, `Packed.attention`).
            cache_BSC: the latents of positions 0..T-1 are written into it when it is given.
        """
        q_nope, q_rope = self._queries(x, rotation)
        latent, key_rope = self._latents(x, rotation)
        if cache_BSC is not None:
            cache_BSC[:, : x.shape[1]] = torch.cat((latent, key_rope), dim=-1)
        k_nope, v = self.kv_b(latent).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, key_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), dim=-1)
        return self.out(attend(q, k, v, self.scale).flatten(-2))

    def decode(self, x_BKD: Tensor, rotation_BKR: Tensor, attend: AttendLatents) -> Tensor:
        """K tokens per row (mostly one), absorbed: scores and outputs live in the latent space.

        Args:
            x_BKD: the block's normalised input for the newest tokens of each row.
            rotation_BKR: the rotations of their positions, (B, K, R/2).
            attend: puts the new latents into this layer's cache and attends to what each token may see.
        """
        B, K = x_BKD.shape[:2]
        if not isinstance(self.kv_b, nn.Linear):
            raise ConfigError(
                "decoding reads kv_b's weight itself, which an adapter leaves as it is: decode with "
                "lit_reason.models.lora.merged_copy(model), as the builtin engine does"
            )
        q_nope, q_rope = (part.flatten(0, 1) * self.scale for part in self._queries(x_BKD, rotation_BKR))
        new_BKC = torch.cat(self._latents(x_BKD, rotation_BKR), dim=-1)
        k_HNC, v_HVC = self.kv_b.weight.view(self.heads, -1, self.latent).split((self.nope, self.value), dim=1)
        # T = B K tokens
        q_latent_HTC = torch.bmm(q_nope.transpose(0, 1), k_HNC)
        out_THC = attend(torch.cat((q_latent_HTC.transpose(0, 1), q_rope), dim=-1), new_BKC)
        out_HTV = torch.bmm(out_THC[..., : self.latent].transpose(0, 1), v_HVC.transpose(1, 2))
        return self.out(out_HTV.transpose(0, 1).reshape(B, K, -1))

    def _queries(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        return q_nope, apply_rope(q_rope, rotation.unsqueeze(-2))

    def _latents(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        latent, key_rope = self.kv_a(x).split((self.latent, self.rope), dim=-1)
        return self.kv_norm(latent), apply_rope(key_rope, rotation)
