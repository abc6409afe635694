"""Latent attention with its weights laid out for decoding: what `MLA.decode` computes, in fewer steps.

    one product    [query | rotary queries | rotary key | latent]: the rows of `q` (or of its first factor) and `kv_a`
    one rotation   of all rotary parts
    two products   with the halves of `kv_b`, contiguous here, the softmax scale in the first

Made anew for every generation, so it cannot be older than the weights. Shapes: B rows, H heads; N, R, Dv = qk_nope,
qk_rope and v head dims; C = kv_lora_rank."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reason.models.layers import RMSNorm
from lit_reason.models.mla import MLA, AttendLatents
from lit_reason.models.rope import apply_rope


class Absorbed:
    """One layer's attention.

    Args:
        mla: whose weights are copied in another order; its norms are used as they are.
    """

    def __init__(self, mla: MLA) -> None:
        assert isinstance(mla.kv_b, nn.Linear)
        self.mla, self.scale = mla, mla.scale
        H, N, R = mla.heads, mla.nope, mla.rope
        latent, key = mla.kv_a.weight.split((mla.latent, R))
        if isinstance(mla.q, nn.Linear):
            self.first, self.second, self.norm = torch.cat((_halves(mla.q, H, N), key, latent)), None, None
        else:
            low, self.norm, high = cast(tuple[nn.Linear, RMSNorm, nn.Linear], tuple(mla.q))
            self.first, self.second = torch.cat((low.weight, key, latent)), _halves(high, H, N)
        k_HNC, v_HVC = mla.kv_b.weight.view(H, -1, mla.latent).split((N, mla.value), dim=1)
        self.k_HNC = (k_HNC * self.scale).contiguous()
        self.v_HCV = v_HVC.transpose(1, 2).contiguous()

    def decode(self, x_BKD: Tensor, rotation_BKR: Tensor, attend: AttendLatents) -> Tensor:
        """See `MLA.decode`; one token per row, K = 1."""
        mla, x_BD = self.mla, x_BKD[:, 0]
        H, N, R = mla.heads, mla.nope, mla.rope
        first = F.linear(x_BD, self.first)
        if self.second is None or self.norm is None:
            q_nope, rotary, latent_BC = first.split((H * N, (H + 1) * R, mla.latent), dim=-1)
        else:
            q_low, key_BR, latent_BC = first.split((len(self.first) - R - mla.latent, R, mla.latent), dim=-1)
            q_nope, q_rope = F.linear(self.norm(q_low), self.second).split((H * N, H * R), dim=-1)
            rotary = torch.cat((q_rope, key_BR), dim=-1)
        rotary_BHR = apply_rope(rotary.unflatten(-1, (H + 1, R)), rotation_BKR)
        new_BC = torch.cat((mla.kv_norm(latent_BC), rotary_BHR[:, H]), dim=-1)
        q_BHC = new_BC.new_empty(len(x_BD), H, mla.latent + R)
        q_BHC[..., : mla.latent] = torch.bmm(q_nope.unflatten(-1, (H, N)).transpose(0, 1), self.k_HNC).transpose(0, 1)
        torch.mul(rotary_BHR[:, :H], self.scale, out=q_BHC[..., mla.latent :])
        out_BHC = attend(q_BHC, new_BC[:, None])
        out_HBV = torch.bmm(out_BHC[..., : mla.latent].transpose(0, 1), self.v_HCV)
        return mla.out(out_HBV.transpose(0, 1).reshape(x_BKD.shape[0], 1, -1))


def _halves(q: nn.Linear, heads: int, nope: int) -> Tensor:
    """The rows of all heads' parts without rotation, then those of the rotary parts."""
    rows = q.weight.view(heads, -1, q.in_features)
    return torch.cat((rows[:, :nope].flatten(0, 1), rows[:, nope:].flatten(0, 1)))
