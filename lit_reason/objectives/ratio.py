"""Axis 2, the importance ratio of the new policy to the one that sampled.

    B sequences   T tokens

Every choice is a pure function `f(new_logprobs_BT, old_logprobs_BT, mask_BT, *, settings) -> ratio_BT` that carries the
gradient. Log-probs are finite and 0 where masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def token(new_logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """r_t = exp(new_t - old_t): PPO, GRPO, DAPO (arXiv 1707.06347, 2402.03300).

    Trap: `old` is the *trainer's* log-prob; the engine's differs by rounding, and belongs in a correction weight.
    """
    return safe_exp(new_logprobs_BT - old_logprobs_BT)


def sequence(new_logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """GSPO: s = exp(mean_t (new_t - old_t)), the same at every token of a sequence (arXiv 2507.18071).

    Trap: use `seq_mean_token_mean` and a clip about 100 times narrower than PPO's (3e-4 / 4e-4); a token-mean
    aggregation brings the length weights back.
    """
    difference_BT = (new_logprobs_BT - old_logprobs_BT) * mask_BT
    mean_B1 = difference_BT.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return safe_exp(mean_B1).expand_as(new_logprobs_BT)


def sequence_product(new_logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """exp(sum_t (new_t - old_t)), the exact ratio of whole sequences, as TRL's RLOO clips it (arXiv 2402.14740).

    Trap: not divided by the length, so long sequences reach any bound at once.
    """
    difference_BT = (new_logprobs_BT - old_logprobs_BT) * mask_BT
    return safe_exp(difference_BT.sum(dim=1, keepdim=True)).expand_as(new_logprobs_BT)


def sequence_token(new_logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """GSPO-token: s_t = sg[s] * pi_t / sg[pi_t], for advantages that differ within a sequence (arXiv 2507.18071).

    Trap: with one advantage per sequence, value and gradient equal `sequence`.
    """
    level_BT = sequence(new_logprobs_BT, old_logprobs_BT, mask_BT).detach()
    return level_BT * torch.exp(new_logprobs_BT - new_logprobs_BT.detach())


RATIOS: dict[str, Callable[..., Tensor]] = {
    "token": token,
    "sequence": sequence,
    "sequence_product": sequence_product,
    "sequence_token": sequence_token,
}


def safe_exp(x: Tensor) -> Tensor:
    """exp(x), with x bounded so that neither it nor its square overflows the dtype (44 in float32, 354 in float64).

    An infinite ratio is clipped in value, but its backward is 0 * inf = NaN. A finite result below the bound is not
    changed in any bit.
    """
    limits = torch.finfo(x.dtype)
    # One rounding below half the logarithm: rounded up, the square of its exponential would overflow.
    return torch.exp(x.clamp(max=math.log(limits.max) / 2 * (1 - limits.eps)))
