"""Axis 3, the surrogate: what is minimised per token, and where it stops pushing.

    B sequences   T tokens

Every choice is a pure function

    f(ratio_BT, advantages_BT, logprobs_BT, *, settings) -> Surrogate(loss_BT, low_BT, high_BT)

`logprobs_BT` are the new policy's, for surrogates that put the gradient on them instead of on the ratio.
`low_BT` and `high_BT` (bool) mark the tokens that the lower and the upper bound cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_reason.errors import ConfigError


class Surrogate(NamedTuple):
    """One loss per token (to be minimised, not masked yet) and the tokens whose gradient was cut."""

    loss_BT: Tensor
    low_BT: Tensor
    high_BT: Tensor


def ppo(
    ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor, *, low: float, high: float, dual: float | None
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


def none(ratio_BT: Tensor, advantages_BT: Tensor, logprobs_BT: Tensor) -> Surrogate:
    """-r A, the plain importance-weighted policy gradient; one update per round makes it REINFORCE.

    Trap: with several updates per round nothing bounds the step.
    """
    never_BT = torch.zeros_like(ratio_BT, dtype=torch.bool)
    return Surrogate(-ratio_BT * advantages_BT, never_BT, never_BT)


CLIPS: dict[str, Callable[..., Surrogate]] = {"ppo": ppo, "none": none}
