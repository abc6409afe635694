"""From easy to hard: which prompts a run may meet yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from lit_reason.errors import ConfigError, DataError, nearest
from lit_reason.types import Prompt


class Curriculum:
    """Round r deals from the easiest fraction f(r) = min(1, start + (1 - start) r / rounds) of the prompts.

    A round is `prompts_per_round` dealt prompts (`PromptCursor`), so that dynamic sampling, which asks for more than
    that, goes through it in fewer rounds of training.

    Args:
        start: the share of the prompts in round 0.
        rounds: the round from which on all are dealt.
        key: the difficulty is this number in `Prompt.meta`, dotted where nested: `fields.level` of a JSONL line,
            `reasoning_gym.entry.metadata.num_terms`. None: the number of prompt tokens.

    YAML, or typed: `'data.curriculum={_target_: lit_reason.data.Curriculum, start: 0.25, rounds: 50}'`.

    Trap: tasks of a mixed source are ranked on one scale. With `key=None` those with long instructions come last.
    """

    def __init__(self, start: float = 0.25, rounds: int = 50, key: str | None = None) -> None:
        if not 0 < start <= 1:
            raise ConfigError(
                f"data.curriculum.start={start}; valid: above 0, at most 1. Type data.curriculum.start=0.25"
            )
        if rounds < 1:
            raise ConfigError(f"data.curriculum.rounds={rounds}; valid: 1 or more. Type data.curriculum.rounds=50")
        self.start, self.rounds, self.key = start, rounds, key

    def pool(self, size: int, round: int) -> int:
        """How many of `size` prompts may be dealt in a round: ceil(f(r) * size)."""
        if round >= self.rounds:
            return size
        return math.ceil((self.start + (1 - self.start) * round / self.rounds) * size)

    def ranks(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """int64: 0 for the easiest prompt; equally difficult ones in the given order."""
        values = [_number(prompt, self.key) if self.key else len(prompt.token_ids) for prompt in prompts]
        ranks = np.empty(len(prompts), dtype=np.int64)
        ranks[np.argsort(np.array(values, dtype=np.float64), kind="stable")] = np.arange(len(prompts))
        return ranks


def check_curriculum(curriculum: object) -> None:
    """ConfigError for what a node without a `_target_` gives: a plain mapping."""
    if not isinstance(curriculum, Curriculum):
        raise ConfigError(
            f"data.curriculum={curriculum!r}; valid: a node with a _target_. Type "
            "'data.curriculum={_target_: lit_reason.data.Curriculum, start: 0.25, rounds: 50}'"
        )


def _number(prompt: Prompt, key: str) -> float:
    """The number under a dotted key of a prompt's `meta`."""
    node: Any = prompt.meta
    for depth, part in enumerate(key.split(".")):
        if not isinstance(node, Mapping) or part not in node:
            head = "".join(f"{p}." for p in key.split(".")[:depth])
            beside = [f"{head}{name}" for name in node] if isinstance(node, Mapping) else []
            raise DataError(
                f"data.curriculum.key={key}: the prompt {prompt.id} of {prompt.source} has no such entry in its meta: "
                f"{nearest(key, beside)}. Type data.curriculum.key=NAME, or null for the number of prompt tokens"
            )
        node = node[part]
    if not isinstance(node, Real) or isinstance(node, bool) or not math.isfinite(node):
        raise DataError(
            f"data.curriculum.key={key}: the prompt {prompt.id} of {prompt.source} has {node!r:.100} there; "
            "valid: a finite number"
        )
    return float(node)
