"""Regularised policy gradient: the KL to the *sampling* policy inside the surrogate (RPG, arXiv 2505.17508).

    B sequences   T tokens   w = pi / pi_old   x = log pi

| divergence           | KL             | differentiable loss         | REINFORCE-style weight in -sg(weight) x |
|----------------------|----------------|-----------------------------|-----------------------------------------|
| forward              | KL(old || pi)  | -wA - beta log w            | wA + beta                               |
| forward_unnormalised | + mass         | -wA + beta (w - log w - 1)  | wA - beta (w - 1)                       |
| reverse              | KL(pi || old)  | -wA + beta w log w          | w (A - beta (log w + 1))                |
| reverse_unnormalised | + mass         | -wA + beta (w log w - w + 1)| w (A - beta log w)                      |

Row by row the two columns have the same gradient (Prop. 4.1); the losses' values differ.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.objectives.surrogate import Surrogate

Divergence = Literal["forward", "forward_unnormalised", "reverse", "reverse_unnormalised"]


def rpg(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    divergence: Divergence,
    beta: float,
    style: Literal["differentiable", "reinforce"],
) -> Surrogate:
    """The table above, without any clip (arXiv 2505.17508, Table 1 and Prop. 4.1).

    Trap: the reference is the policy that sampled, not a frozen one: with one update per round w is 1, and nothing is
    regularised. The unnormalised KLs have no gradient then; that of the others is -beta (forward) or +beta (reverse) on
    every token, zero in expectation and noise otherwise.
    """
    w_BT, log_w_BT = ratio_BT, _log(ratio_BT)
    never_BT = torch.zeros_like(w_BT, dtype=torch.bool)
    if style == "differentiable":
        kl_BT = {
            "forward": -log_w_BT,
            "forward_unnormalised": w_BT - log_w_BT - 1,
            "reverse": w_BT * log_w_BT,
            "reverse_unnormalised": w_BT * log_w_BT - w_BT + 1,
        }[divergence]
        return Surrogate(-w_BT * advantages_BT + beta * kl_BT, never_BT, never_BT)
    weight_BT = w_BT * advantages_BT + beta * _component(w_BT, divergence)
    return Surrogate(-weight_BT.detach() * logprobs_BT, never_BT, never_BT)


def rpg_clip(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    divergence: Divergence,
    beta: float,
    low: float,
    high: float,
    dual: float,
) -> Surrogate:
    """RPG-REINFORCE with RPG-Style Clip (arXiv 2505.17508, Algorithm 2), l = -log pi, everything else detached.

    C = beta * the KL's part of the weight, at w clipped to [1 - low, 1 + high]. A + C/w >= 0: (A w + C) l below
    1 + high, the constant (A (1 + high) + C) l above. A + C/w < 0: (A w + C) l between 1 - low and `dual`, the
    constants (A (1 - low) + C) l and (A dual + C) l outside.

    Trap: the branch is the sign of A + C/w, not of A. The released code has -C in two constants: the value differs, the
    gradient does not.
    """
    if dual <= 1:
        raise ConfigError(f"clip.dual: got {dual}; valid: a number above 1. Type algorithm.clip.dual=10")
    w_BT, surprise_BT = ratio_BT.detach(), -logprobs_BT
    kl_BT = beta * _component(w_BT.clamp(1 - low, 1 + high), divergence)
    up_BT = advantages_BT + kl_BT / w_BT.clamp(min=torch.finfo(w_BT.dtype).tiny) >= 0
    low_BT, high_BT = ~up_BT & (w_BT <= 1 - low), up_BT & (w_BT >= 1 + high)
    away_BT = ~up_BT & (w_BT >= dual)
    bounded_BT = torch.where(low_BT, 1 - low, torch.where(high_BT, 1 + high, torch.where(away_BT, dual, w_BT)))
    loss_BT = (advantages_BT * bounded_BT + kl_BT) * surprise_BT
    cut_BT = low_BT | high_BT | away_BT
    return Surrogate(torch.where(cut_BT, loss_BT.detach(), loss_BT), low_BT, high_BT)


def regularised_advantages(ratio_BT: Tensor, advantages_BT: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """A - beta (log w + 1) for `reverse`, A - beta log w for `reverse_unnormalised`, A for the forward ones; detached.

    What §3.3 and G.2 of arXiv 2505.17508 put into a dual clip. Trap: for the forward KLs the regularisation is gone.
    """
    log_w_BT = _log(ratio_BT).detach()
    if divergence == "reverse":
        return advantages_BT - beta * (log_w_BT + 1)
    return advantages_BT - beta * log_w_BT if divergence == "reverse_unnormalised" else advantages_BT


def _component(w_BT: Tensor, divergence: Divergence) -> Tensor:
    """The KL's part of the REINFORCE-style weight, without beta."""
    return {
        "forward": torch.ones_like(w_BT),
        "forward_unnormalised": 1 - w_BT,
        "reverse": -w_BT * (_log(w_BT) + 1),
        "reverse_unnormalised": -w_BT * _log(w_BT),
    }[divergence]


def _log(ratio_BT: Tensor) -> Tensor:
    # A ratio that underflowed to 0 has no logarithm.
    return ratio_BT.clamp(min=torch.finfo(ratio_BT.dtype).tiny).log()
