"""Is the answer right? Strictly (inside the tags) or blind to the format. Answers are parsed, never evaluated."""

from __future__ import annotations

from lit_reason.rewards.base import ItemReward, RewardFault, Tags
from lit_reason.rewards.numbers import last_number, parse_number, same_answer
from lit_reason.types import Completion, Prompt, RewardState


class AnswerExact(ItemReward):
    """1 when the text inside the one pair of answer tags is the reference answer, else 0.

    A numeric reference is compared as an exact number (`$1,234.00` is `1234`; see `numbers`), any other as text with
    its spaces squeezed. No pair of tags, or more than one, is 0: listing guesses must not pay.

    Args:
        ignore_case: compare text without regard to case.
        answer_open, answer_close: the tags.
        weight: the column's weight.
    """

    def __init__(
        self,
        ignore_case: bool = False,
        answer_open: str = "<answer>",
        answer_close: str = "</answer>",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.ignore_case = ignore_case
        self.tags = Tags(answer_open=answer_open, answer_close=answer_close)

    def score(self, prompt: Prompt, completion: Completion) -> float | RewardFault:
        if not prompt.answer.strip():
            return no_reference(prompt)
        got = self.tags.answer(completion.text)
        return float(got is not None and same_answer(got, prompt.answer, self.ignore_case))


class AnswerAnywhere(AnswerExact):
    """The same, blind to the format: it measures skill apart from obedience.

    It looks inside the last pair of answer tags if there is one, else at the whole text. There, a numeric reference
    must be the whole or the last number; a text reference must be the whole or the last line that is not blank.
    """

    def score(self, prompt: Prompt, completion: Completion) -> float | RewardFault:
        if not prompt.answer.strip():
            return no_reference(prompt)
        inside = self.tags.last_answer(completion.text)
        text = (completion.text if inside is None else inside).strip()
        if same_answer(text, prompt.answer, self.ignore_case):
            return 1.0
        wanted = parse_number(prompt.answer)
        if wanted is not None:
            return float(last_number(text) == wanted)
        last_line = text.splitlines()[-1] if text else ""
        return float(same_answer(last_line, prompt.answer, self.ignore_case))


def no_reference(prompt: Prompt) -> RewardFault:
    """The fault of a prompt that cannot be judged by its answer."""
    return RewardFault(RewardState.ERROR, f"prompt {prompt.id} of {prompt.source} has no reference answer")
