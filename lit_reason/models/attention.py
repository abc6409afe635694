"""Softmax attention over given tokens. Everything else in the model is per token: only here a batch's layout matters.

Shapes: B rows, T queries, S keys, H heads; head dims are left unnamed ("...d")."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# (q, k, v, scale) -> out: tensors (*tokens, H, d), where *tokens is (B, T) of a batch or (N,) of packed tokens.
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]

_SHORT = 512  # up to here the CPU's fused kernel is several times slower than the plain products


def causal(q_BTHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor, scale: float) -> Tensor:
    """Every token sees itself and those before it; padding on the right is harmless."""
    return attend(q_BTHd, k_BTHd, v_BTHd, scale)


def attend(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v, (B, T, H, d of v).

    Args:
        bias: broadcastable to (B, H, T, S), in q's dtype; -inf hides a key, and no query may have all keys hidden.
            None is causal attention, S = T.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BSHd, v_BSHd))
    if q.device.type == "cpu" and k.shape[-2] <= _SHORT:
        if bias is None:
            bias = torch.full((q.shape[-2], k.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)
        scores = ((q * scale) @ k.transpose(-1, -2)).add_(bias)
        return (scores.softmax(-1) @ v).transpose(1, 2)
    # Fused kernels want equal head dims, and else store the (B, H, T, S) scores.
    size = v.shape[-1]
    if size < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - size))
    elif size > q.shape[-1]:
        q, k = F.pad(q, (0, size - q.shape[-1])), F.pad(k, (0, size - k.shape[-1]))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)
    return out[..., :size].transpose(1, 2)
