"""The critic's side of PPO, as pure functions: generalised advantage estimation and the value loss.

B sequences   R rewards   T tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from lit_reason.errors import ConfigError, nearest
from lit_reason.objectives.choices import check_value
from lit_reason.objectives.statistics import weighted_sum, whiten
from lit_reason.types import Assessed


@dataclass(frozen=True, slots=True)
class CriticSettings:
    """How values are learnt.

    Args:
        trunk: `"separate"` is a model of its own that starts as a copy of the policy; `"shared"` is a value head on the
            policy's own states, whose gradient then reaches the policy too.
        lr_factor: times the policy's learning rate, for the critic's own parameters.
        loss_coef: weight of the value loss. With Adam and a separate trunk it acts through the clipping of the common
            gradient norm alone; how fast values are learnt is `lr_factor`.
        clip: how far a value may move in an update before it stops counting (`value_loss`); None is unbounded.
    """

    trunk: Literal["separate", "shared"]
    lr_factor: float
    loss_coef: float
    clip: float | None


def resolve_critic(spec: Mapping[str, Any]) -> CriticSettings:
    """`{trunk, lr_factor, loss_coef, clip}`, each named; ConfigError for anything else."""
    hints = {field.name: get_type_hints(CriticSettings)[field.name] for field in fields(CriticSettings)}
    for key in spec:
        if key not in hints:
            raise ConfigError(f"critic: got key {key!r}; {nearest(str(key), hints)}. Type algorithm.critic.KEY=VALUE")
    for key, hint in hints.items():
        if key not in spec:
            raise ConfigError(f"critic: {key!r} is missing, got {sorted(spec)}. Type +algorithm.critic.{key}=VALUE")
        check_value(f"critic.{key}", spec[key], hint)
    if not spec["lr_factor"] > 0:
        raise ConfigError(
            f"critic.lr_factor: got {spec['lr_factor']}; valid: above 0. Type algorithm.critic.lr_factor=10"
        )
    return CriticSettings(**spec)


def gae_advantages(
    rewards_BR: Tensor,
    weights_R: Tensor,
    group_B: Tensor,
    valid_B: Tensor,
    mask_BT: Tensor,
    values_BT: Tensor,
    penalty_BT: Tensor | None = None,
    *,
    gamma: float,
    lam: float,
    holes: Literal["skip", "zero"],
    whiten_eps: float | None,
) -> Assessed:
    """PPO: GAE over token rewards: the reward on the last token, `penalty_BT` on each (arXiv 1506.02438, 1909.08593).

    Whitened over all tokens with the sample variance + `whiten_eps`; None leaves them as they are.

    Trap: the returns are made of the raw advantages, whitening comes after. With gamma and lam 1 the critic is a mere
    baseline, A = R - V; lam 0 trusts it wholly.
    """
    on_BT = (mask_BT > 0) & valid_B[:, None]
    position_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    last_B = (on_BT * position_T).argmax(dim=1)
    rewards_BT = torch.zeros_like(values_BT) if penalty_BT is None else penalty_BT
    rewards_BT = rewards_BT.scatter_add(1, last_B[:, None], weighted_sum(rewards_BR, weights_R)[:, None])
    raw_BT, returns_BT = gae(rewards_BT, values_BT, on_BT, gamma=gamma, lam=lam, holes=holes)
    if whiten_eps is not None:
        raw_BT = whiten(raw_BT, on_BT.to(raw_BT.dtype), eps=whiten_eps, ddof=1)
    return Assessed(raw_BT, returns_BT)


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    holes: Literal["skip", "zero"],
) -> tuple[Tensor, Tensor]:
    """(advantages_BT, returns_BT), both 0 where masked (arXiv 1506.02438 eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return = A + V.

    `holes`: a masked stretch inside a sequence (a tool's output). `"skip"` goes on at the next token that counts
    (verl); `"zero"` has V = 0 and no reward there, and A passes through, decayed (OpenRLHF, TRL).

    Trap: returns are made of the *raw* advantages; whiten afterwards.
    """
    on_BT = mask_BT > 0
    rewards_BT, values_BT = rewards_BT.masked_fill(~on_BT, 0), values_BT.masked_fill(~on_BT, 0)
    next_value_B, next_advantage_B = torch.zeros_like(values_BT[:, 0]), torch.zeros_like(values_BT[:, 0])
    columns = []
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B, value_B = delta_B + gamma * lam * next_advantage_B, values_BT[:, t]
        columns.append(advantage_B)
        if holes == "skip":
            advantage_B = torch.where(on_BT[:, t], advantage_B, next_advantage_B)
            value_B = torch.where(on_BT[:, t], value_B, next_value_B)
        next_value_B, next_advantage_B = value_B, advantage_B
    advantages_BT = torch.stack(columns[::-1], dim=1).masked_fill(~on_BT, 0)
    return advantages_BT, advantages_BT + values_BT


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, *, clip: float | None) -> Tensor:
    """0.5 max((V - R)^2, (clip(V, V_old +- clip) - R)^2) per token, to be averaged over the step's tokens.

    As in OpenAI's PPO ("The 37 Implementation Details of PPO", 2022, detail 9). `clip` None: 0.5 (V - R)^2.

    Trap: the *larger* of the two: where the bounded one wins outside the range, the gradient is 0.
    """
    plain_BT = (values_BT - returns_BT).square()
    if clip is None:
        return 0.5 * plain_BT
    bounded_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain_BT, (bounded_BT - returns_BT).square())
