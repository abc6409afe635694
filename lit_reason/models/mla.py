"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1). Shapes: B rows, T tokens, H heads, S cached
positions; N, R, Dv = qk_nope, qk_rope and v head dims; C = kv_lora_rank, the latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reason.models.cache import SLOTS
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
                RMSNorm(config.q_lora_rank, config.norm_eps),
                nn.Linear(config.q_lora_rank, q_out, bias=False),
            )
        self.kv_a = nn.Linear(width, self.latent + self.rope, bias=False)
        self.kv_norm = RMSNorm(self.latent, config.norm_eps)
        self.kv_b = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.out = nn.Linear(self.heads * self.value, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache_BSC: Tensor | None = None) -> Tensor:
        """Causal attention over positions 0..T-1; writes the latents into `cache_BSC` when it is given."""
        B, T, _ = x_BTD.shape
        q_nope, q_rope = self._queries(x_BTD, cos_TR[:, None], sin_TR[:, None])
        latent_BTC, key_rope_BTR = self._latents(x_BTD, cos_TR, sin_TR)
        if cache_BSC is not None:
            cache_BSC[:, :T] = torch.cat((latent_BTC, key_rope_BTR), dim=-1)
        k_nope, v = self.kv_b(latent_BTC).view(B, T, self.heads, -1).split((self.nope, self.value), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, key_rope_BTR[:, :, None].expand(-1, -1, self.heads, -1)), dim=-1)
        out = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale)
        return self.out(out.transpose(1, 2).reshape(B, T, -1))

    def decode(self, x_BD: Tensor, cos_BR: Tensor, sin_BR: Tensor, cache_BSC: Tensor, at: Cursor) -> Tensor:
        """One token per row, absorbed: scores and outputs live in the latent space.

        Args:
            x_BD: the block's normalised input for the newest token of each row.
            cos_BR, sin_BR: rotary tables at each row's position.
            cache_BSC: this layer's latents; the new one is written at `at.position_B`.
            at: where each row stands.
        """
        q_nope_BHN, q_rope_BHR = self._queries(x_BD, cos_BR[:, None], sin_BR[:, None])
        latent_BC, key_rope_BR = self._latents(x_BD, cos_BR, sin_BR)
        cache_BSC[at.row_B, at.position_B] = torch.cat((latent_BC, key_rope_BR), dim=-1).to(cache_BSC.dtype)
        live_BSC = cache_BSC[:, : at.longest]
        k_HNC, v_HVC = self.kv_b.weight.view(self.heads, -1, self.latent).split((self.nope, self.value), dim=1)
        q_BHC = torch.cat((torch.einsum("bhn,hnc->bhc", q_nope_BHN, k_HNC), q_rope_BHR), dim=-1)
        scores_BHS = torch.baddbmm(at.bias_B1S, q_BHC, live_BSC.transpose(1, 2), alpha=self.scale)
        weights_BHS = scores_BHS.float().softmax(-1).to(live_BSC.dtype)
        out_BHC = torch.bmm(weights_BHS, live_BSC[..., : self.latent])
        return self.out(torch.einsum("bhc,hvc->bhv", out_BHC, v_HVC).flatten(1))

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        return q_nope, apply_rope(q_rope, cos, sin)

    def _latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        latent, key_rope = self.kv_a(x).split((self.latent, self.rope), dim=-1)
        return self.kv_norm(latent), apply_rope(key_rope, cos, sin)


class Cursor:
    """Where each row of a decode step stands.

    Args:
        position_B: int64, the position that the new token takes in its row.
        dtype: of the additive bias that hides positions beyond a row's own.
    """

    def __init__(self, position_B: Tensor, dtype: torch.dtype) -> None:
        self.position_B = position_B
        self.row_B = torch.arange(position_B.shape[0], device=position_B.device)
        self.longest = -(-(int(position_B.max()) + 1) // SLOTS) * SLOTS
        hidden_BS = torch.arange(self.longest, device=position_B.device) > position_B[:, None]
        self.bias_B1S = torch.zeros(hidden_BS.shape, dtype=dtype, device=position_B.device)
        self.bias_B1S = self.bias_B1S.masked_fill(hidden_BS, float("-inf"))[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax(q k^T) v for (B, H, T, .) tensors.

    Values are padded to the key's size: fused kernels want equal head dims, and else store the (B, H, T, T) scores.
    """
    if q.device.type == "cpu" and q.shape[-2] <= 512:  # the CPU's fused kernel is 6 times slower on short sequences
        T = q.shape[-2]
        hidden_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = ((q * scale) @ k.transpose(-1, -2)).masked_fill(hidden_TT, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    size = v.shape[-1]
    if size < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - size))
    elif size > q.shape[-1]:
        q, k = F.pad(q, (0, size - q.shape[-1])), F.pad(k, (0, size - k.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :size]
