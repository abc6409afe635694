"""Statistics over groups and over tokens, shared by the advantages.

B sequences   R rewards   P prompts (groups)   T tokens
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def weighted_sum(values_BR: Tensor, weights_R: Tensor) -> Tensor:
    """The rubric's total of each row."""
    return (values_BR * weights_R).sum(dim=1)


def centre(values_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """values - group mean, exactly 0 for invalid rows and flat groups; with (index_B, count_P, flat_B) for reuse."""
    index_B = torch.unique(group_B, return_inverse=True)[1]
    zeros_P = values_B.new_zeros(int(index_B.max()) + 1 if len(index_B) else 0)
    count_P = zeros_P.index_add(0, index_B, valid_B.to(values_B.dtype))
    mean_P = zeros_P.index_add(0, index_B, values_B.masked_fill(~valid_B, 0)) / count_P.clamp(min=1)
    lowest_P = zeros_P.scatter_reduce(0, index_B, values_B.masked_fill(~valid_B, torch.inf), "amin", include_self=False)
    highest_P = zeros_P.scatter_reduce(
        0, index_B, values_B.masked_fill(~valid_B, -torch.inf), "amax", include_self=False
    )
    flat_B = (highest_P <= lowest_P)[index_B]
    centred_B = (values_B - mean_P[index_B]).masked_fill(flat_B | ~valid_B, 0)
    return centred_B, (index_B, count_P, flat_B)


def normalise(values_B: Tensor, group_B: Tensor, valid_B: Tensor, eps: float, ddof: int) -> Tensor:
    """(values - group mean) / (group std + eps)."""
    centred_B, (index_B, count_P, flat_B) = centre(values_B, group_B, valid_B)
    square_P = torch.zeros_like(count_P).index_add(0, index_B, centred_B.square())
    std_P = (square_P / (count_P - ddof).clamp(min=1)).sqrt()
    # 1 instead of 0 + eps in flat groups: eps may be 0, and their numerator is 0 already.
    return centred_B / (std_P[index_B] + eps).masked_fill(flat_B, 1)


def whiten(
    values_BT: Tensor, count_BT: Tensor, *, eps: float, ddof: int, eps_rule: Literal["add", "floor"] = "add"
) -> Tensor:
    """(values - mean) / std over tokens, each counted `count_BT` times; 0 where that is 0, or where all are equal.

    `eps_rule`: `"add"` is rsqrt(var + eps) (verl), `"floor"` is rsqrt(max(var, eps)) (OpenRLHF).
    """
    on_BT = count_BT > 0
    counted_N = values_BT[on_BT]
    if counted_N.numel() == 0 or counted_N.max() == counted_N.min():
        return torch.zeros_like(values_BT)
    tokens = count_BT.sum()
    centred_BT = (values_BT - (count_BT * values_BT).sum() / tokens).masked_fill(~on_BT, 0)
    variance = (count_BT * centred_BT.square()).sum() / (tokens - ddof).clamp(min=1)
    return centred_BT * (variance + eps if eps_rule == "add" else variance.clamp(min=eps)).rsqrt()
