"""PPO with a critic, as pure functions: generalised advantages, returns and the clipped value loss.

    B sequences   T tokens

No policy module here trains a critic; these are for one that does. The advantages go into `PolicyBatch.advantages_BT`,
whitened by `statistics.whiten` if wanted, and any surrogate takes them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


@torch.no_grad()
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
