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
        text: what a scorer that returns text said; then `value` is NaN.
        broken: the worker process itself failed, twice, which no confined payload should bring about.
    """

    state: RewardState
    value: float = float("nan")
    message: str = ""
    text: str = ""
    broken: bool = False
