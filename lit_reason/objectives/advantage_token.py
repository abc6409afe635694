"""Advantages that differ along a sequence: a KL per token in the reward, and statistics over tokens.

    B sequences   R rewards   T tokens

`penalty_BT` is -weight * (old - ref), the KL of `kl.name: k1_token_reward`, 0 where masked; None without one.
`old_logprobs_BT` are the sampling policy's log-probs, 0 where masked.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.objectives.statistics import centre, normalise, weighted_sum, whiten
from lit_reason.types import Assessed


def reinforce_pp(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    penalty_BT: Tensor | None = None,
    *,
    eps: float,
    eps_rule: Literal["add", "floor"],
    ddof: int,
) -> Tensor:
    """REINFORCE++: A_t = whiten(R - beta sum_{i>=t} (old_i - ref_i)), over all tokens of the batch (arXiv 2501.03262).

    `eps_rule: floor` with `ddof: 0` is the authors' code, `add` with 1 is verl's.

    Trap: the mean is weighted by length, so it is not the mean reward: with long wrong answers every token of a correct
    answer gets more than with short ones.
    """
    return_BT = weighted_sum(rewards_BR, weights_R)[:, None].expand(mask_BT.shape)
    if penalty_BT is not None:
        return_BT = return_BT + _to_go(penalty_BT, 1.0)
    return whiten(return_BT, _count(return_BT, mask_BT, valid_B), eps=eps, ddof=ddof, eps_rule=eps_rule)


def reinforce_pp_baseline(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    eps: float,
    eps_rule: Literal["add", "floor"],
    ddof: int,
) -> Tensor:
    """REINFORCE++-baseline: A = whiten(R - mean_group), over all tokens of the batch (arXiv 2501.03262).

    Trap: whitening subtracts a length-weighted mean that is not 0 although every group is centred, so groups *without
    any signal* get a non-zero advantage.
    """
    centred_B, _ = centre(weighted_sum(rewards_BR, weights_R), group_B, valid_B)
    centred_BT = centred_B[:, None].expand(mask_BT.shape)
    return whiten(centred_BT, _count(centred_BT, mask_BT, valid_B), eps=eps, ddof=ddof, eps_rule=eps_rule)


def distill(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    penalty_BT: Tensor | None = None,
    *,
    discount: float,
) -> Tensor:
    """On-policy distillation: A_t = -weight (log p_old - log q_teacher), the teacher being the reference.

    Thinking Machines, "On-Policy Distillation" (2025). `discount` 0 is theirs: a token answers for itself alone; with
    1 for all that follows. Verifiable rewards are not used. Needs `kl.name: k1_token_reward`.

    Trap: never centre or normalise it: the sign of each token is the signal.
    """
    if penalty_BT is None:
        raise ConfigError(
            "advantage 'distill' learns from a KL per token and got none; valid: kl k1_token_reward with a weight "
            "above 0. Type 'algorithm.kl={name: k1_token_reward, weight: 1.0}'"
        )
    return (_to_go(penalty_BT, discount) if discount else penalty_BT).masked_fill(~valid_B[:, None], 0)


def clip_cov(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    old_logprobs_BT: Tensor,
    *,
    eps: float,
    ddof: int,
    low: float,
    high: float,
    fraction: float,
) -> Tensor:
    """Clip-Cov: GRPO's advantage, 0 on a few of the tokens that lower the entropy most (arXiv 2505.22617).

    cov_t = (log p_t - mean log p) (A_t - mean A) over all tokens; of those within `low` .. `high`, `fraction` times all
    tokens (rounded down) are drawn and get A = 0, by a generator seeded with the number of tokens.

    Trap: drawn once per round, at the policy that sampled, before the round is split into micro-batches; the authors
    draw anew at every update. `fraction` is of *all* tokens: in a round of fewer than 1 / fraction none is drawn.
    """
    advantages_BT, covariance_BT, on_BT = _covariance(
        rewards_BR, weights_R, group_B, valid_B, mask_BT, old_logprobs_BT, eps, ddof
    )
    candidates = (on_BT & (covariance_BT >= low) & (covariance_BT <= high)).flatten().nonzero()[:, 0]
    tokens = int(on_BT.sum())
    lots = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(tokens))[: int(fraction * tokens)]
    return advantages_BT.flatten().index_fill(0, candidates[lots.to(candidates.device)], 0.0).view_as(advantages_BT)


def kl_cov(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    old_logprobs_BT: Tensor,
    *,
    eps: float,
    ddof: int,
    fraction: float,
) -> Assessed:
    """KL-Cov: GRPO's advantage; the `fraction` of all tokens with the highest covariance is marked (arXiv 2505.22617).

    The covariance is `clip_cov`'s. The surrogate `kl_cov` holds the marked tokens to the policy that sampled.

    Trap: at least one token of the round is marked, however small the fraction.
    """
    advantages_BT, covariance_BT, on_BT = _covariance(
        rewards_BR, weights_R, group_B, valid_B, mask_BT, old_logprobs_BT, eps, ddof
    )
    tokens = int(on_BT.sum())
    count = min(max(1, int(fraction * tokens)), tokens)
    highest = covariance_BT.masked_fill(~on_BT, -torch.inf).flatten().topk(count).indices
    marked_BT = torch.zeros_like(on_BT).flatten().index_fill(0, highest, True).view_as(on_BT)
    return Assessed(advantages_BT, marked_BT=marked_BT)


def _covariance(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    old_logprobs_BT: Tensor,
    eps: float,
    ddof: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's advantages, (log p - mean log p) (A - mean A) over all tokens, and which tokens these are."""
    advantages_B = normalise(weighted_sum(rewards_BR, weights_R), group_B, valid_B, eps, ddof)
    advantages_BT = advantages_B[:, None].repeat(1, mask_BT.shape[1])
    on_BT = (mask_BT > 0) & valid_B[:, None]
    mean_advantage, mean_logprob = (
        x.masked_fill(~on_BT, 0).sum() / on_BT.sum() for x in (advantages_BT, old_logprobs_BT)
    )
    return advantages_BT, (old_logprobs_BT - mean_logprob) * (advantages_BT - mean_advantage), on_BT


def _to_go(values_BT: Tensor, discount: float) -> Tensor:
    """sum_{i >= t} discount^(i - t) values_i."""
    if discount == 1:
        return values_BT.flip(1).cumsum(1).flip(1)
    total_B, columns = torch.zeros_like(values_BT[:, 0]), []
    for value_B in reversed(values_BT.unbind(1)):
        total_B = value_B + discount * total_B
        columns.append(total_B)
    return torch.stack(columns[::-1], dim=1)


def _count(like_BT: Tensor, mask_BT: Tensor, valid_B: Tensor) -> Tensor:
    return mask_BT.to(like_BT.dtype) * valid_B[:, None]
