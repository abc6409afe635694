"""Advantages for rewards of 0 and 1: other functions of the success rate p than its mean.

    B sequences   R rewards   P prompts (groups)   n completions of a prompt   c of them correct

Averaged over a group, each pushes along h'(p) grad p (Davis & Recht, arXiv 2510.13651):

| choice      | h'(p)                                      | what rises                                   |
|-------------|--------------------------------------------|----------------------------------------------|
| maxrl       | sum_{k=1}^{n-1} (1-p)^(k-1)                | log p, truncated at order n-1                |
| pkpo        | k (1-p)^(k-1)                              | pass@k = 1 - (1-p)^k                         |
| passk       | pass@k's, over its own standard deviation  | pass@k                                       |

The weights are for a *mean* over a prompt's completions (`seq_mean_token_sum`): papers that sum have 1/n in them.
A completion is correct if its weighted reward reaches `threshold` (to 1e-6: weights are rounded). So these are for one
reward of 0 and 1, `reward=[answer]`: a second one that adds or subtracts moves completions over the threshold, and so
would a KL in the reward; it belongs in the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.objectives.statistics import centre, weighted_sum


def maxrl(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    eps: float,
    baseline: Literal["group_mean"] | None,
) -> Tensor:
    """MaxRL: A_i = (R_i - mean_group) / (mean_group + eps), 0 where nothing was rewarded (arXiv 2602.02710).

    Without the baseline R_i / mean_group: log p truncated at order n instead of n-1. The paper's further 1/n belongs to
    its sum over a group; here the aggregation divides.

    Trap: for one reward of 0 and 1 (`reward=[answer]`): a second reward that everybody gets makes the mean, and with it
    the whole effect, that of a likely success. A mean of 0 or below gives 0.
    """
    reward_B = weighted_sum(rewards_BR, weights_R).masked_fill(~valid_B, 0)
    centred_B, (index_B, count_P, _) = centre(reward_B, group_B, valid_B)
    mean_B = (torch.zeros_like(count_P).index_add(0, index_B, reward_B) / count_P.clamp(min=1))[index_B]
    numerator_B = reward_B if baseline is None else centred_B
    return (numerator_B / torch.where(mean_B > 0, mean_B + eps, 1)).masked_fill(mean_B <= 0, 0)


def pkpo(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    k: int,
    threshold: float,
    baseline: Literal["leave_one_out_minus_one"] | None,
) -> Tensor:
    """PKPO: the unbiased gradient of pass@k (arXiv 2505.15201, binary rewards).

    A = k where correct, else k (1 - C(n-1-c, k-1) / C(n-1, k-1)): the chance that another of k would save the set.
    `leave_one_out_minus_one`: k C(n-c, k-1) / C(n-1, k-1) where correct, else 0: the same mean with less variance.

    Trap: without the baseline a wrong answer in a good group is pushed *up*, almost like a correct one. A group with
    fewer than k valid rows has no estimate and gets 0.
    """
    _check_k("pkpo", k)
    correct_B, n_B, c_B = _counts(rewards_BR, weights_R, group_B, valid_B, threshold)
    if baseline is None:
        wrong_B = 1 - _choose_ratio(n_B - 1 - c_B, n_B - 1, k - 1)
        weight_B = torch.where(correct_B, torch.ones_like(n_B), wrong_B)
    else:
        weight_B = _choose_ratio(n_B - c_B, n_B - 1, k - 1) * correct_B
    return (k * weight_B).masked_fill(~valid_B | (n_B < k), 0)


def passk(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    k: int,
    threshold: float,
) -> Tensor:
    """Pass@k training: the expected GRPO advantage of the k-subsets that hold a completion (arXiv 2508.10751).

    R = 1 - C(n-c, k) / C(n, k),  sigma = sqrt(R (1-R));  A = (1-R) / sigma where correct, else
    (1 - R - C(n-c-1, k-1) / C(n-1, k-1)) / sigma.

    Trap: sigma is 0 not only where all are wrong but as soon as n-c < k, long before the group is flat: those get 0.
    With n = k that is every group: sample more than k.
    """
    _check_k("passk", k)
    correct_B, n_B, c_B = _counts(rewards_BR, weights_R, group_B, valid_B, threshold)
    fail_B = _choose_ratio(n_B - c_B, n_B, k)
    sigma_B = (fail_B * (1 - fail_B)).sqrt()
    numerator_B = torch.where(correct_B, fail_B, fail_B - _choose_ratio(n_B - c_B - 1, n_B - 1, k - 1))
    silent_B = ~valid_B | (n_B < k) | (sigma_B == 0)
    return (numerator_B / sigma_B.masked_fill(silent_B, 1)).masked_fill(silent_B, 0)


def _check_k(name: str, k: int) -> None:
    if k < 1:
        raise ConfigError(f"advantage.k: got {k} for {name!r}; valid: 1 or more. Type algorithm.advantage.k=2")


def _counts(
    rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, valid_B: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(correct_B, valid rows n_B and correct rows c_B of each row's group)."""
    reward_B = weighted_sum(rewards_BR, weights_R)
    correct_B = (reward_B >= threshold - 1e-6) & valid_B
    _, (index_B, count_P, _) = centre(reward_B, group_B, valid_B)
    c_P = torch.zeros_like(count_P).index_add(0, index_B, correct_B.to(count_P.dtype))
    return correct_B, count_P[index_B], c_P[index_B]


def _choose_ratio(a_B: Tensor, b_B: Tensor, k: int) -> Tensor:
    """C(a, k) / C(b, k) as a product of k factors: exact to rounding, 0 where a < k."""
    ratio_B = torch.ones_like(b_B)
    for j in range(k):
        ratio_B = ratio_B * (a_B - j).clamp(min=0) / (b_B - j).clamp(min=1)
    return ratio_B
