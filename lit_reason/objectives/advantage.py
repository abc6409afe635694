"""Axis 1, the advantage: from reward columns to one number per completion, or per token.

    B sequences   R rewards   P prompts (groups)   T tokens

Every choice is a pure function

    f(rewards_BR, weights_R, group_B, valid_B, mask_BT, *, settings) -> advantages_B  (or advantages_BT)

where `group_B` (int64) names the prompt of each row, rows with `valid_B` False count in no statistic and get 0, and the
rows are those of one whole optimizer step or more (a batch statistic over a micro-batch would be another objective).
A choice may name more that it wants to know: `penalty_BT`, a KL per token (`kl.name: k1_token_reward`),
`old_logprobs_BT`, the sampling policy's log-probs, `values_BT`, the critic's, or `greedy_BR`, the rewards of the greedy
completion of each row's prompt. What it has to say besides the advantage comes as `Assessed`.

| choice                            | A                                              | file                 |
|-----------------------------------|------------------------------------------------|----------------------|
| group_mean                        | R - mean_group                                 | here                 |
| group_norm                        | (R - mean_group) / std_group                   | here                 |
| group_mean_batch_std              | (R - mean_group) / std_batch                   | here                 |
| rloo                              | R - mean of the others                         | here                 |
| reinforce                         | R, or R - mean_batch                           | here                 |
| remax                             | R - R of the greedy completion                 | here                 |
| none                              | 0: no reward counts                            | here                 |
| gdpo                              | sum of columns, each normalised                | here                 |
| maxrl, pkpo, passk                | for rewards of 0 and 1                         | advantage_binary.py  |
| reinforce_pp(_baseline), distill  | one number per token                           | advantage_token.py   |
| clip_cov, kl_cov                  | group_norm; tokens of high covariance apart    | advantage_token.py   |
| gae                               | a critic's, PPO                                | critic.py            |

Common to all that compare within a group: a group whose rewards are all equal, or that has one member, gets exactly 0.
Without that guard the rounding of the mean is divided by the tiny eps: seven float32 rewards of 0.1 give 0.82 with eps
1e-9. (What is whitened over tokens afterwards is the exception: see `reinforce_pp_baseline`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lit_reason.objectives.advantage_binary import maxrl, passk, pkpo
from lit_reason.objectives.advantage_token import clip_cov, distill, kl_cov, reinforce_pp, reinforce_pp_baseline
from lit_reason.objectives.critic import gae_advantages
from lit_reason.objectives.statistics import centre, normalise, weighted_sum, whiten


def reinforce(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    baseline: Literal["batch_mean"] | None,
) -> Tensor:
    """REINFORCE: A_i = R_i - b, b the mean reward of the batch or 0 (Williams 1992).

    Trap: without a baseline rewards of 0 and 1 never push a wrong answer down, and the variance is the largest of all.
    """
    reward_B = weighted_sum(rewards_BR, weights_R)
    if baseline is None:
        return reward_B.masked_fill(~valid_B, 0)
    return centre(reward_B, torch.zeros_like(group_B), valid_B)[0]


def remax(
    rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, valid_B: Tensor, mask_BT: Tensor, greedy_BR: Tensor
) -> Tensor:
    """ReMax: A_i = R_i - R(greedy completion of the same prompt) (arXiv 2310.10505).

    Trap: the greedy completion is one more to generate and to score per prompt, not per sample; it is not trained on.
    """
    return weighted_sum(rewards_BR - greedy_BR.to(rewards_BR.dtype), weights_R).masked_fill(~valid_B, 0)


def none(rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, valid_B: Tensor, mask_BT: Tensor) -> Tensor:
    """A = 0: what is learnt comes from the distillation, KL or entropy terms alone.

    Trap: the rewards are still computed and logged, and decide nothing.
    """
    return torch.zeros_like(rewards_BR[:, 0])


def group_mean(rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, valid_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Dr.GRPO: A_i = R_i - mean_group(R), R the weighted sum of the columns (arXiv 2503.20783).

    Trap: the mean includes the sample itself, so the expected gradient is (G-1)/G of RLOO's. Other trainers' `dr_grpo`
    loss leaves the division by the std on; here there is none to switch off.
    """
    centred_B, _ = centre(weighted_sum(rewards_BR, weights_R), group_B, valid_B)
    return centred_B


def rloo(rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, valid_B: Tensor, mask_BT: Tensor) -> Tensor:
    """RLOO: A_i = R_i - mean_{j != i} R_j = G / (G-1) (R_i - mean_group) (arXiv 2402.14740).

    Trap: G is the number of *valid* rows of the group: a failed verifier changes the factor.
    """
    centred_B, (index_B, count_P, _) = centre(weighted_sum(rewards_BR, weights_R), group_B, valid_B)
    return centred_B * (count_P / (count_P - 1).clamp(min=1))[index_B]


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
    return normalise(weighted_sum(rewards_BR, weights_R), group_B, valid_B, eps, ddof)


def group_mean_batch_std(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    *,
    eps: float,
    ddof: int,
) -> Tensor:
    """Lite PPO: A_i = (R_i - mean_group) / (std_batch + eps) (arXiv 2508.08221).

    Trap: the std is that of the *raw* rewards of all prompts, not of the centred ones: it holds the spread between easy
    and hard prompts too.
    """
    reward_B = weighted_sum(rewards_BR, weights_R)
    over_batch_B, (_, count_1, flat_B) = centre(reward_B, torch.zeros_like(group_B), valid_B)
    std = (over_batch_B.square().sum() / (count_1 - ddof).clamp(min=1)).sqrt()
    return centre(reward_B, group_B, valid_B)[0] / (std + eps).expand_as(reward_B).masked_fill(flat_B, 1)


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
    columns = [normalise(reward_B, group_B, valid_B, eps, ddof) for reward_B in rewards_BR.unbind(1)]
    sum_B = weighted_sum(torch.stack(columns, dim=1), weights_R)
    if batch_norm == "sequence":
        return normalise(sum_B, torch.zeros_like(group_B), valid_B, batch_eps, ddof)
    if batch_norm == "token":
        length_B = mask_BT.to(sum_B.dtype).sum(dim=1) * valid_B
        return whiten(sum_B[:, None], length_B[:, None], eps=batch_eps, ddof=ddof)[:, 0]
    return sum_B


ADVANTAGES: dict[str, Callable[..., Any]] = {
    "none": none,
    "remax": remax,
    "gae": gae_advantages,
    "reinforce": reinforce,
    "group_mean": group_mean,
    "rloo": rloo,
    "group_norm": group_norm,
    "group_mean_batch_std": group_mean_batch_std,
    "gdpo": gdpo,
    "maxrl": maxrl,
    "pkpo": pkpo,
    "passk": passk,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "distill": distill,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}

# For rewards of 0 and 1: a KL added to them would make others of them.
BINARY = {"maxrl", "pkpo", "passk"}
# Alone in its group a completion has advantage 0 with these.
COMPARING = {
    "reinforce_pp_baseline",
    "clip_cov",
    "kl_cov",
    "group_mean",
    "rloo",
    "group_norm",
    "group_mean_batch_std",
    "gdpo",
}


def min_group_size(name: str, settings: Mapping[str, Any]) -> int:
    """Completions per prompt below which a choice's every advantage is 0.

    `pkpo` needs k. `passk` needs more: with k completions pass@k of a group is 0 or 1 for each and never varies.
    """
    if name == "pkpo":
        return int(settings["k"])
    if name == "passk":
        return int(settings["k"]) + 1
    if name == "maxrl":
        return 1 if settings["baseline"] is None else 2
    return 2 if name in COMPARING else 1
