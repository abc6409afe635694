"""Which groups carry a signal: what dynamic sampling keeps (DAPO, arXiv 2503.14476, section 3.2).

B sequences   R rewards
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_reason.objectives.statistics import centre, weighted_sum


def informative(rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, valid_B: Tensor, *, per_reward: bool) -> Tensor:
    """bool (B,): rows of groups whose valid rows differ in reward, so that an advantage within the group is not 0.

    With one reward of 0 and 1 this is DAPO's 0 < #correct < G. A group with fewer than two valid rows carries nothing.
    The answer is the same for all rows of a group, failed ones included, so that whole groups are kept or dropped.

    Sums are compared exactly, in float64, as the advantages compute them. Float32 columns of 0.1 + 0.2 and 0.3 + 0
    are 7e-9 apart there, for `group_norm` as much as here: use rewards that float32 holds exactly (0.5, 0.25).

    Args:
        rewards_BR, weights_R: as for the advantages; NaN in rows that are not valid.
        group_B: int64, which prompt a row belongs to; rows need not be sorted.
        valid_B: rows whose rewards are all known.
        per_reward: False: the weighted sum must vary. True, for advantages that normalise each column (`gdpo`): some
            column whose weight is not 0 must.

    Trap: a right answer in bad form and a wrong one in good form may have the same sum. That says "no signal" where
    `gdpo` finds two, which cancel only if their weights are equal and one column mirrors the other.
    """
    rewards_BR, weights_R = rewards_BR.double(), weights_R.double()
    columns_BR = rewards_BR[:, weights_R != 0] if per_reward else weighted_sum(rewards_BR, weights_R)[:, None]
    informative_B = torch.zeros_like(valid_B, dtype=torch.bool)
    for column_B in columns_BR.unbind(1):
        _, (_, _, flat_B) = centre(column_B, group_B, valid_B)
        informative_B |= ~flat_B
    return informative_B
