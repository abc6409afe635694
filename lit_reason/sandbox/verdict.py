"""What the sandbox says of one payload."""

from __future__ import annotations

from dataclasses import dataclass

from lit_reason.types import RewardState


@dataclass(frozen=True, slots=True)
class Verdict:
    """One scored payload.

    Args:
        state: OK, ERROR (the scorer raised, crashed or did something forbidden) or TIMEOUT.
        value: the score when the state is OK, else NaN.
        message: why the state is not OK, `""` when it is.
    """

    state: RewardState
    value: float = float("nan")
    message: str = ""
