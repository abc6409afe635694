"""Axis 3, the surrogate: what is minimised per token, and where it stops pushing.

    B sequences   T tokens   r ratio   x log-prob of the new policy

Every choice is a pure function

    f(ratio_BT, advantages_BT, logprobs_BT, mask_BT, *, settings) -> Surrogate(loss_BT, low_BT, high_BT)

A choice that treats some tokens apart takes `marked_BT` too (bool, from the advantage of the same name).
`logprobs_BT` are the new policy's, for surrogates that put the gradient on them instead of on the ratio. Where masked,
the ratio is 1 and the other two are 0. `low_BT` and `high_BT` (bool) mark the tokens that the lower and the upper bound
cut off.

| choice                       | gradient of -loss w.r.t. x                                  | with its ratio          |
|------------------------------|-------------------------------------------------------------|-------------------------|
| none                         | r A                                                         | any                     |
| reinforce                    | A                                                           | unused                  |
| ppo                          | r A, 0 outside the bounds                                   | any                     |
| cispo                        | min(r, cap) A                                               | token                   |
| sapo                         | r A, fading with r - 1                                      | token                   |
| dppo                         | r A, 0 where the policy has moved too far                   | token                   |
| gmpo                         | (product of r)^(1/L) A, 0 on clipped tokens                 | token                   |
| kl_cov                       | r A, on marked tokens pulled back to the old policy         | token                   |
| rpg, rpg_clip, rpg_dual_clip | with a KL to the sampling policy inside; see rpg.py         | token                   |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.objectives.rpg import Divergence, regularised_advantages, rpg, rpg_clip
from lit_reason.objectives.surrogate import Surrogate


def ppo(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    low: float,
    high: float,
    dual: float | None,
) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347; clip-higher: DAPO, arXiv 2503.14476).

    `dual` = c > 1 also caps the loss at -c A where A < 0, with zero gradient for r > c (arXiv 1912.09729); `null` is
    off. The released DAPO recipe has c = 10, verl's default is 3.

    Trap: only half of the bounds ever acts: the lower one where A < 0, the upper one where A > 0. A ratio that runs
    away with A < 0 is bounded by `dual` alone.
    """
    if dual is not None and dual <= 1:
        raise ConfigError(f"clip.dual: got {dual}; valid: null or a number above 1. Type algorithm.clip.dual=10")
    clipped_BT = ratio_BT.clamp(1 - low, 1 + high)
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    negative_BT = advantages_BT < 0
    if dual is not None:
        loss_BT = torch.where(negative_BT, torch.minimum(loss_BT, -dual * advantages_BT), loss_BT)
    return Surrogate(loss_BT, negative_BT & (ratio_BT < 1 - low), (advantages_BT > 0) & (ratio_BT > 1 + high))


def none(ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor, mask_BT: Tensor) -> Surrogate:
    """-r A, the plain importance-weighted policy gradient; one update per round makes it REINFORCE.

    Trap: with several updates per round nothing bounds the step.
    """
    return Surrogate(-ratio_BT * advantages_BT, *_never(ratio_BT))


def reinforce(ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor, mask_BT: Tensor) -> Surrogate:
    """-A x: the score function without any ratio (Williams 1992; RLOO as printed, arXiv 2402.14740).

    Trap: right for one update per round only; from the second on the samples are another policy's and nothing says so.
    The value is no measure of progress: x multiplies it.
    """
    return Surrogate(-advantages_BT * logprobs_BT, *_never(ratio_BT))


def cispo(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    floor: float | None,
    cap: float,
) -> Surrogate:
    """CISPO: -sg[clip(r, floor, cap)] A x, every token keeps a gradient (MiniMax-M1, arXiv 2506.13585 eq. 4-5).

    Trap: `cap` is *absolute* (1 + eps_high of the paper, which states no number; ScaleRL, arXiv 2510.13786, finds 4 to
    8 alike). The paper has no floor; verl's default is 0.8 with a cap of 1.2, which is another algorithm.
    """
    weight_BT = ratio_BT.detach().clamp(min=floor, max=cap)
    low_BT = _never(ratio_BT)[0] if floor is None else ratio_BT < floor
    return Surrogate(-weight_BT * advantages_BT * logprobs_BT, low_BT, ratio_BT > cap)


def sapo(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    tau_positive: float,
    tau_negative: float,
) -> Surrogate:
    """SAPO: -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A (arXiv 2511.20347).

    The gradient w.r.t. r is 4 s (1 - s) A, s the sigmoid: A at r = 1, fading smoothly on both sides.

    Trap: the value at r = 1 is -2 A / tau, not -A. With tau 1 a token at r = 3 still pushes with 42% of A, times r.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ConfigError(
            f"clip.tau_positive, clip.tau_negative: got {tau_positive}, {tau_negative}; valid: above 0. "
            "Type algorithm.clip.tau_positive=1.0"
        )
    tau_BT = torch.where(advantages_BT > 0, tau_positive, tau_negative).to(ratio_BT.dtype)
    gate_BT = 4 / tau_BT * torch.sigmoid(tau_BT * (ratio_BT - 1))
    return Surrogate(-gate_BT * advantages_BT, *_never(ratio_BT))


def dppo(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    divergence: Literal["tv", "kl"],
    threshold: float,
) -> Surrogate:
    """DPPO: -M r A, M = 0 where the update would move *further* from a policy already `threshold` away
    (arXiv 2602.04879 eq. 11-14): A > 0 and r > 1, or A < 0 and r < 1, and D > threshold.

    D between Bernoulli(p) of the sampled token, old to new: `tv` |p_new - p_old|, `kl` p_old log(p_old / p_new) +
    (1 - p_old) log((1 - p_old) / (1 - p_new)).

    Trap: needs `ratio: token`, from which p_old is recovered. A rare token may rise a hundredfold and stays within `tv`
    0.2; that is the point, and nothing else bounds its ratio.
    """
    new_BT = logprobs_BT.detach().exp()
    old_BT = new_BT / ratio_BT.detach().clamp(min=torch.finfo(ratio_BT.dtype).tiny)
    if divergence == "tv":
        distance_BT = (new_BT - old_BT).abs()
    else:
        # Bounded away from 0 and 1, where the logarithms end; eps is the dtype's last digit.
        eps = torch.finfo(new_BT.dtype).eps
        new_BT, old_BT = new_BT.clamp(eps, 1 - eps), old_BT.clamp(eps, 1 - eps)
        distance_BT = old_BT * (old_BT / new_BT).log() + (1 - old_BT) * ((1 - old_BT) / (1 - new_BT)).log()
    far_BT = distance_BT > threshold
    low_BT, high_BT = far_BT & (advantages_BT < 0) & (ratio_BT < 1), far_BT & (advantages_BT > 0) & (ratio_BT > 1)
    return Surrogate((-ratio_BT * advantages_BT).masked_fill(low_BT | high_BT, 0), low_BT, high_BT)


def gmpo(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    low: float,
    high: float,
) -> Surrogate:
    """GMPO: -A (prod_t clip(r_t))^(1/L), the geometric mean of the tokens' ratios (arXiv 2507.20673).

    Each token's log r is bounded before the mean, by `high` above where A > 0 and by -`low` below where A < 0: bounds
    on the *logarithm*, 0.4 is e^0.4 = 1.49.

    Trap: needs `ratio: token`, `seq_mean_token_mean` and one advantage per sequence. `ratio: sequence` with `ppo` is
    GSPO, which clips the mean; this clips the tokens.
    """
    log_BT = ratio_BT.clamp(min=torch.finfo(ratio_BT.dtype).tiny).log()
    high_BT, low_BT = (advantages_BT > 0) & (log_BT > high), (advantages_BT < 0) & (log_BT < -low)
    bounded_BT = log_BT.masked_fill(high_BT, high).masked_fill(low_BT, -low)
    mean_B1 = (bounded_BT * mask_BT).sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return Surrogate(-advantages_BT * mean_B1.exp(), low_BT, high_BT)


def kl_cov(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    marked_BT: Tensor,
    *,
    coef: float,
) -> Surrogate:
    """KL-Cov: -(r A - coef |log r|) on marked tokens, -r A on all others (arXiv 2505.22617).

    Trap: |log r| has no gradient at r = 1, so in a round's first update the marked tokens learn like the others.
    """
    log_BT = ratio_BT.clamp(min=torch.finfo(ratio_BT.dtype).tiny).log()
    penalty_BT = coef * log_BT.abs().masked_fill(~marked_BT, 0)
    return Surrogate(penalty_BT - ratio_BT * advantages_BT, *_never(ratio_BT))


def rpg_dual_clip(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    divergence: Divergence,
    beta: float,
    low: float,
    high: float,
    dual: float | None,
) -> Surrogate:
    """RPG's differentiable clip: `ppo` on sg[A - the KL's part] (arXiv 2505.17508 §3.3, G.2).

    Trap: for the forward KLs it is `ppo` without any KL.
    """
    regularised_BT = regularised_advantages(ratio_BT, advantages_BT, divergence, beta)
    return ppo(ratio_BT, regularised_BT, logprobs_BT, mask_BT, low=low, high=high, dual=dual)


CLIPS: dict[str, Callable[..., Surrogate]] = {
    "ppo": ppo,
    "none": none,
    "reinforce": reinforce,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
    "gmpo": gmpo,
    "kl_cov": kl_cov,
    "rpg": rpg,
    "rpg_clip": rpg_clip,
    "rpg_dual_clip": rpg_dual_clip,
}


# These recover something from each token's own ratio.
TOKEN_RATIO = {"dppo", "gmpo", "kl_cov"}


def _never(like_BT: Tensor) -> tuple[Tensor, Tensor]:
    """No token was cut, on either side."""
    never_BT = torch.zeros_like(like_BT, dtype=torch.bool)
    return never_BT, never_BT
