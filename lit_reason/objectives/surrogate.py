"""What every choice of the clip axis returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Surrogate(NamedTuple):
    """One loss per token (to be minimised, not masked yet) and the tokens whose gradient was cut (or weight capped)."""

    loss_BT: Tensor
    low_BT: Tensor
    high_BT: Tensor
