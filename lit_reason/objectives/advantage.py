"""Axis 1, the advantage: from reward columns to one number per completion.

    B sequences   R rewards   P prompts (groups)   T tokens

Every choice is a pure function

    f(rewards_BR, weights_R, group_B, valid_B, mask_BT, *, settings) -> advantages_B  (or advantages_BT)

where `group_B` (int64) names the prompt of each row, rows with `valid_B` False count in no statistic and get 0, and the
rows are those of one whole optimizer step or more (a batch statistic over a micro-batch would be another objective).

Common to all: a group whose rewards are all equal, or that has one member, gets exactly 0. Without that guard the
rounding of the mean is divided by the tiny eps: seven float32 rewards of 0.1 give 0.82 with eps 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def group_mean(rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, valid_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Dr.GRPO: A_i = R_i - mean_group(R), R the weighted sum of the columns (arXiv 2503.20783).

    Trap: the mean includes the sample itself, so the expected gradient is (G-1)/G of RLOO's. Other trainers' `dr_grpo`
    loss leaves the division by the std on; here there is none to switch off.
    """
    centred_B, _ = _centre(_weighted_sum(rewards_BR, weights_R), group_B, valid_B)
    return centred_B


def group_norm(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    eps: float,
    ddof: int,
) -> Tensor:
    """GRPO: A_i = (R_i - mean_group) / (std_group + eps), R the weighted sum (arXiv 2402.03300 eq. 3-4).

    Trap: `ddof` 1 (sample std) is what TRL, verl and OpenRLHF compute; 0 makes advantages sqrt(G/(G-1)) larger.
    Trap: with several rewards the sum hides which one varied: (0,0) against (0,1) and (0,0) against (1,1) give the same
    advantages. See `gdpo`.
    """
    return _normalise(_weighted_sum(rewards_BR, weights_R), group_B, valid_B, eps, ddof)


def gdpo(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    eps: float,
    ddof: int,
    batch_norm: Literal["sequence", "token"] | None,
    batch_eps: float,
) -> Tensor:
    """GDPO: normalise each reward in its group, add with the weights, normalise over the batch (arXiv 2601.05242).

    (4) A_k = (r_k - mean_group) / (std_group + eps);  (7) S = sum_k w_k A_k;  (6) A = (S - mean) / (std + batch_eps).

    `batch_norm="sequence"` is the paper's text and the authors' TRL code: over rows, so that the mean is 0 and only the
    scale changes (a flat group is 0 up to the rounding of that mean). `"token"` is their verl code: rows weighted by
    length, and `batch_eps` on the *variance*. `null` stops after (7).

    Trap: the weights act on normalised advantages, so a reward's own scale is irrelevant; a reward that varies in few
    groups still counts fully there. Trap: `"token"` subtracts a length-weighted mean that is not 0, so groups without
    any signal get a non-zero advantage.
    """
    columns = [_normalise(reward_B, group_B, valid_B, eps, ddof) for reward_B in rewards_BR.unbind(1)]
    sum_B = _weighted_sum(torch.stack(columns, dim=1), weights_R)
    if batch_norm == "sequence":
        return _normalise(sum_B, torch.zeros_like(group_B), valid_B, batch_eps, ddof)
    if batch_norm == "token":
        return _whiten_by_length(sum_B, mask_BT, valid_B, batch_eps, ddof)
    return sum_B


ADVANTAGES: dict[str, Callable[..., Tensor]] = {"group_mean": group_mean, "group_norm": group_norm, "gdpo": gdpo}

# Smallest group that a choice can learn from (1 where it is not named): with fewer every advantage is 0.
MIN_GROUP_SIZE = {"group_mean": 2, "group_norm": 2, "gdpo": 2}


def _weighted_sum(values_BR: Tensor, weights_R: Tensor) -> Tensor:
    return (values_BR * weights_R).sum(dim=1)


def _centre(values_B: Tensor, group_B: Tensor, valid_B: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
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


def _normalise(values_B: Tensor, group_B: Tensor, valid_B: Tensor, eps: float, ddof: int) -> Tensor:
    """(values - group mean) / (group std + eps)."""
    centred_B, (index_B, count_P, flat_B) = _centre(values_B, group_B, valid_B)
    square_P = torch.zeros_like(count_P).index_add(0, index_B, centred_B.square())
    std_P = (square_P / (count_P - ddof).clamp(min=1)).sqrt()
    # 1 instead of 0 + eps in flat groups: eps may be 0, and their numerator is 0 already.
    return centred_B / (std_P[index_B] + eps).masked_fill(flat_B, 1)


def _whiten_by_length(values_B: Tensor, mask_BT: Tensor, valid_B: Tensor, eps: float, ddof: int) -> Tensor:
    """(values - mean) * rsqrt(var + eps), each row counted once per masked-in token."""
    length_B = mask_BT.to(values_B.dtype).sum(dim=1) * valid_B
    tokens = length_B.sum().clamp(min=1)
    counted_B = values_B[length_B > 0]
    if counted_B.numel() == 0 or counted_B.max() == counted_B.min():
        return torch.zeros_like(values_B)
    centred_B = values_B - (length_B * values_B).sum() / tokens
    variance = (length_B * centred_B.square()).sum() / (tokens - ddof).clamp(min=1)
    return (centred_B * (variance + eps).rsqrt()).masked_fill(~valid_B, 0)
