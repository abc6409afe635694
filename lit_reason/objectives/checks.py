"""What an objective refuses, and what it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_reason.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from lit_reason.objectives.objective import Objective

_MISSING = {
    "reference": "the KL term needs the reference's log-probs: set batch.ref_logprobs_BT, or algorithm.kl.weight=0",
    "old": "a KL in the reward, or this advantage, needs the sampling policy's log-probs: pass old_logprobs_BT, or "
    "type algorithm.kl.name=k2_loss, or another algorithm.advantage",
    "entropy": "an entropy bonus needs the policy's entropy: pass entropy_BT, or type algorithm.entropy_coef=0",
    "critic": "advantage 'gae' and the value loss need the critic's values: pass values_BT",
    "return": "the value loss needs the returns of `Objective.assess`: set batch.returns_BT",
    "greedy reward": "advantage 'remax' needs the rewards of a greedy completion per row: pass greedy_BR",
    "mark": "clip 'kl_cov' needs the marks of advantage 'kl_cov': set batch.marked_BT",
    "divergence": "distillation needs the divergence to the teacher at each token: pass divergence_BT",
    "mismatch": "correction.above needs the round's mismatch: set batch.mismatch_kl",
}


def takes(function: Callable[..., Any], parameter: str) -> bool:
    """Whether a choice names this parameter."""
    return parameter in inspect.signature(function).parameters


def given(tensor: Tensor | None, what: str) -> Tensor:
    """`tensor`; ConfigError with what to do when there is none."""
    if tensor is None:
        raise ConfigError(f"got no {what} values; {_MISSING[what]}")
    return tensor


def check_rewards(rewards_BR: Tensor, valid_B: Tensor) -> None:
    """Raises NonFiniteError for a reward that is not finite in a row that counts."""
    wrong_BR = ~rewards_BR.isfinite() & valid_B[:, None]
    if wrong_BR.any():
        row, column = (int(i) for i in wrong_BR.nonzero()[0])
        raise NonFiniteError(
            f"reward column {column} is {float(rewards_BR[row, column])} in row {row}; valid: a finite number, or "
            "valid_B False for a row whose verifier failed"
        )


def check_group_size(objective: Objective, group_size: int, key: str = "group_size") -> None:
    """Refuse a group that the objective cannot learn from: alone in its group, a completion has advantage 0.

    Args:
        key: what the user types to set it, for the message.

    Raises:
        ConfigError: fewer completions per prompt than the advantage compares.
    """
    if group_size < objective.min_group_size:
        raise ConfigError(
            f"{key}: got {group_size}; valid: {objective.min_group_size} or more, because advantage "
            f"{objective.advantage_name!r} compares the completions of one prompt with each other (alone, every "
            f"advantage is 0 and nothing is learnt). Type {key}=8"
        )
