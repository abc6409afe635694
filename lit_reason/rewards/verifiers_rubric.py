"""The rubric of an environment of the `verifiers` library, as one reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lit_reason.environments.verifiers_env import hosted
from lit_reason.errors import nearest
from lit_reason.rewards.base import RewardFault
from lit_reason.types import Completion, Prompt, RewardState


class VerifiersReward:
    """What their rubric says of an episode that `environment=verifiers` played: the weighted sum of its functions, or
    one of them.

    A function that raises is a fault here; to their own loop it is a 0.

    Args:
        name, args: as in `VerifiersPrompts`.
        function: the name of one reward function or metric; None takes the sum.
        weight: the column's weight.
    """

    def __init__(
        self, name: str, args: Mapping[str, Any] | None = None, function: str | None = None, weight: float = 1.0
    ) -> None:
        self.name, self.args, self.function, self.weight = name, dict(args or {}), function, float(weight)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | RewardFault]:
        host = hosted(self.name, self.args)
        rows = [host.rows.get((completion.prompt_id, completion.seed)) for completion in completions]
        host.run([host.score(row) for row in rows if row is not None])
        return [_fault("it was not played by environment=verifiers") if row is None else self._of(row) for row in rows]

    def _of(self, row: Any) -> float | RewardFault:
        if row.fault:
            return _fault(row.fault)
        values = {"reward": row.state["reward"]} if self.function is None else row.state["metrics"]
        value = values.get(self.function or "reward")
        if value is None:
            return _fault(f"its rubric has no function {self.function!r}: {nearest(str(self.function), values)}")
        return float(value) if math.isfinite(value) else _fault(f"its value is {value}")


def _fault(message: str) -> RewardFault:
    return RewardFault(RewardState.ERROR, message)
