"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1). Shapes: B rows, T tokens, H heads, S cached
positions; N, R, Dv = qk_nope, qk_rope and v head dims; C = kv_lora_rank, the latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError
from lit_reason.models.attention import Attend
from lit_reason.models.cache import LatentCache
from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import RMSNorm
from lit_reason.models.rope import apply_rope, softmax_scale


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

    def decode(self, x_BKD: Tensor, rotation_BKR: Tensor, cache_BSC: Tensor, at: Cursor) -> Tensor:
        """K tokens per row (mostly one), absorbed: scores and outputs live in the latent space.

        Args:
            x_BKD: the block's normalised input for the newest tokens of each row.
            rotation_BKR: the rotations of their positions, (B, K, R/2).
            cache_BSC: this layer's latents; the new ones are written at `at.position_BK`.
            at: where each row stands.
        """
        B, K = x_BKD.shape[:2]
        q_nope, q_rope = self._queries(x_BKD, rotation_BKR)
        latent_BKC, key_rope_BKR = self._latents(x_BKD, rotation_BKR)
        cache_BSC[at.row_B1, at.position_BK] = torch.cat((latent_BKC, key_rope_BKR), dim=-1).to(cache_BSC.dtype)
        if not isinstance(self.kv_b, nn.Linear):
            raise ConfigError(
                "decoding reads kv_b's weight itself, which an adapter leaves as it is: decode with "
                "lit_reason.models.lora.merged_copy(model), as the builtin engine does"
            )
        k_HNC, v_HVC = self.kv_b.weight.view(self.heads, -1, self.latent).split((self.nope, self.value), dim=1)
        # The K tokens of a row are K H queries to the same latents. T = B K tokens, Q = K H queries.
        q_latent_HTC = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), k_HNC)
        q_THC = torch.cat((q_latent_HTC.transpose(0, 1), q_rope.flatten(0, 1)), dim=-1) * self.scale
        weights_BQS = torch.baddbmm(at.bias_BQS, q_THC.view(B, K * self.heads, -1), cache_BSC.transpose(1, 2)).softmax(
            -1
        )
        # Over the rotary part too, whose sum is dropped: a slice of the cache would be copied at every step.
        out_THC = torch.bmm(weights_BQS, cache_BSC).view(B * K, self.heads, -1)[..., : self.latent]
        out_HTV = torch.bmm(out_THC.transpose(0, 1), v_HVC.transpose(1, 2))
        return self.out(out_HTV.transpose(0, 1).reshape(B, K, -1))

    def _queries(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        return q_nope, apply_rope(q_rope, rotation.unsqueeze(-2))

    def _latents(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        latent, key_rope = self.kv_a(x).split((self.latent, self.rope), dim=-1)
        return self.kv_norm(latent), apply_rope(key_rope, rotation)


class Cursor:
    """Where each row of a decode step stands.

    Args:
        position_BK: int64, the positions that the new tokens take in their row.
        cache: grows to hold them.
        heads: H; a row has Q = K H queries, or one mask for all where K = 1.
    """

    def __init__(self, position_BK: Tensor, cache: LatentCache, heads: int) -> None:
        cache.grow(int(position_BK.max()) + 1)
        latents_BSC = cache.layers[0]
        device, S = position_BK.device, latents_BSC.shape[1]
        self.position_BK = position_BK
        self.row_B1 = torch.arange(position_BK.shape[0], device=device)[:, None]
        bias_BKS = torch.zeros(*position_BK.shape, S, dtype=latents_BSC.dtype, device=device)
        bias_BKS.masked_fill_(torch.arange(S, device=device) > position_BK[..., None], float("-inf"))
        self.bias_BQS = bias_BKS if position_BK.shape[1] == 1 else bias_BKS.repeat_interleave(heads, dim=1)
