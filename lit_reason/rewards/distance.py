"""How close is a numeric answer? A slope where exactness gives only a step."""

from __future__ import annotations

import math

from lit_reason.errors import ConfigError
from lit_reason.rewards.answer import no_reference
from lit_reason.rewards.base import ItemReward, RewardFault, Tags
from lit_reason.rewards.numbers import parse_number
from lit_reason.types import Completion, Prompt, RewardState


class AnswerDistance(ItemReward):
    """exp(-e / scale) with the relative error e = |answer - reference| / max(1, |reference|), in [0, 1].

    1 when equal, 1/e = 0.37 at an error of `scale`; 0 when the text inside the answer tags is no number, or one of
    another kind (`70%` for `70`). With scale 0.1 and reference 50: 51 scores 0.82, 60 scores 0.14, 100 scores 0.00005.

    Args:
        scale: the relative error (absolute below |reference| = 1) at which the score has fallen to 0.37.
        answer_open, answer_close: the tags.
        weight: the column's weight.
    """

    def __init__(
        self, scale: float = 0.1, answer_open: str = "<answer>", answer_close: str = "</answer>", weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if not scale > 0:
            raise ConfigError(f"got scale={scale}; valid: a relative error above 0, e.g. scale=0.1")
        self.scale = scale
        self.tags = Tags(answer_open=answer_open, answer_close=answer_close)

    def score(self, prompt: Prompt, completion: Completion) -> float | RewardFault:
        if not prompt.answer.strip():
            return no_reference(prompt)
        want = parse_number(prompt.answer)
        if want is None:
            message = f"the reference {prompt.answer[:50]!r} is not a number: use AnswerExact for {prompt.source}"
            return RewardFault(RewardState.ERROR, message)
        inside = self.tags.answer(completion.text)
        got = None if inside is None else parse_number(inside)
        if got is None or got.percent != want.percent:
            return 0.0
        error = abs(got.value - want.value) / max(1, abs(want.value))
        return math.exp(-float(error) / self.scale)
