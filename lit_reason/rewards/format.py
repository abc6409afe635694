"""Does the completion have the asked-for form? The content is not judged here."""

from __future__ import annotations

from lit_reason.rewards.base import ItemReward, Tags
from lit_reason.types import Completion, Prompt


class FormatExact(ItemReward):
    """1 when the whole text is `<think>..</think><answer>..</answer>` and generation stopped by itself, else 0.

    Each tag occurs once, in this order; nothing stands before, between or after the two blocks.

    Args:
        whitespace: allow blanks and line breaks around and between the two blocks.
        think_open, think_close, answer_open, answer_close: the tags.
        weight: the column's weight.
    """

    def __init__(
        self,
        whitespace: bool = False,
        think_open: str = "<think>",
        think_close: str = "</think>",
        answer_open: str = "<answer>",
        answer_close: str = "</answer>",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.whitespace = whitespace
        self.tags = Tags(think_open, think_close, answer_open, answer_close)

    def score(self, prompt: Prompt, completion: Completion) -> float:
        text, tags = completion.text, self.tags
        if completion.finish_reason != "stop" or not _once_in_order(text, tags):
            return 0.0
        before, rest = text.split(tags.think_open)
        _, rest = rest.split(tags.think_close)
        between, rest = rest.split(tags.answer_open)
        after = rest.split(tags.answer_close)[1]
        outside = before + between + after
        return float((outside.strip() if self.whitespace else outside) == "")


class FormatApprox(ItemReward):
    """Partial credit, in [0, 1]: 0.2 for each of the four tags that occurs exactly once, and 0.2 more when all do, in
    order. Text outside the tags and a missing stop cost nothing, so it is a slope towards `FormatExact`.

    Args:
        think_open, think_close, answer_open, answer_close: the tags.
        weight: the column's weight.
    """

    def __init__(
        self,
        think_open: str = "<think>",
        think_close: str = "</think>",
        answer_open: str = "<answer>",
        answer_close: str = "</answer>",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.tags = Tags(think_open, think_close, answer_open, answer_close)

    def score(self, prompt: Prompt, completion: Completion) -> float:
        text = completion.text
        once = sum(text.count(tag) == 1 for tag in self.tags.all)
        return (once + _once_in_order(text, self.tags)) / 5


def _once_in_order(text: str, tags: Tags) -> bool:
    if any(text.count(tag) != 1 for tag in tags.all):
        return False
    places = [text.index(tag) for tag in tags.all]
    return places == sorted(places)
