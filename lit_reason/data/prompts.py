"""From a source to tokenised prompts on one side of the split."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from lit_reason.data.chat import ChatTemplate, default_chat
from lit_reason.data.curriculum import Curriculum, check_curriculum
from lit_reason.data.questions import held_out
from lit_reason.data.tokenizer import Tokenizer, load_tokenizer
from lit_reason.errors import ConfigError, DataError, nearest
from lit_reason.types import Prompt

log = logging.getLogger(__name__)
Split = Literal["train", "test", "all"]
SPLITS = ("train", "test", "all")


def load_prompts(
    source: Iterable[Prompt],
    split: Split = "all",
    held_out_fraction: float = 0.1,
    tokenizer: Tokenizer | None = None,
    chat: ChatTemplate | None = None,
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """The prompts of one side of the split, in the source's order, with `token_ids`.

    Args:
        source: yields `Prompt`s; see `sources.py`.
        split: `"train"`, `"test"` (held out by the question's hash) or `"all"`.
        held_out_fraction: share of questions on the test side.
        tokenizer, chat: the byte tokenizer and the template that fits the tokenizer by default.
        max_prompt_tokens: a longer prompt is an error that names it, never a cut.
    """
    if split not in SPLITS:
        raise ConfigError(f"got split={split!r}; {nearest(split, SPLITS)}")
    tokenizer = tokenizer or load_tokenizer()
    chat = chat or default_chat(tokenizer)
    wanted = {"train": (False,), "test": (True,), "all": (False, True)}[split]
    chosen: dict[str, Prompt] = {}
    total = 0
    for prompt in source:
        total += 1
        if prompt.id in chosen or held_out(prompt.id, held_out_fraction) not in wanted:
            continue
        ids = tuple(chat.prompt_ids(tokenizer, prompt.question))
        _check_length(prompt, len(ids), max_prompt_tokens)
        chosen[prompt.id] = replace(prompt, token_ids=ids)
    if not total:
        raise DataError("no prompts: the source gave 0 questions; check data.source")
    if not chosen:
        raise DataError(
            f"no prompts: the source gave {total} questions, of which none is on the {split!r} side with "
            f"held_out_fraction={held_out_fraction}. Give more questions, or type e.g. data.held_out_fraction=0.5"
        )
    return list(chosen.values())


def _check_length(prompt: Prompt, tokens: int, limit: int | None) -> None:
    if limit is not None and tokens > limit:
        raise DataError(
            f"the prompt {prompt.id} of {prompt.source} has {tokens} tokens, more than max_prompt_tokens={limit}. "
            f"Set data.max_prompt_tokens={tokens} (and a model context that holds prompt and completion), "
            f"or remove the question: {prompt.question[:80]!r}"
        )


class PromptData:
    """One source, one tokenizer and one split, shared by pretraining text, priming, RL and evaluation.

    Args:
        source: yields `Prompt`s; read once, on first use.
        tokenizer: a `Tokenizer`, or what `load_tokenizer` takes: `"bytes"`, a folder, a hub name.
        held_out_fraction: share of all questions that no training stage sees.
        max_prompt_tokens: longest prompt in tokens, template included; longer is an error.
        chat: the template; by default the one that fits the tokenizer.
        curriculum: in which order of difficulty RL meets the training side; the other stages ignore it.

    Example::

        >>> data = PromptData(ReasoningGym({"chain_sum": {"max_terms": 3}}, size=2000))
        >>> train, test = data.train_prompts(), data.test_prompts(100)

    YAML (`conf/data/arith.yaml`): a node with `_target_: lit_reason.data.PromptData`.
    """

    def __init__(
        self,
        source: Iterable[Prompt],
        tokenizer: Tokenizer | str = "bytes",
        held_out_fraction: float = 0.1,
        max_prompt_tokens: int = 256,
        chat: ChatTemplate | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        if curriculum is not None:
            check_curriculum(curriculum)
        self.source = source
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.chat = chat or default_chat(self.tokenizer)
        self.held_out_fraction = held_out_fraction
        self.max_prompt_tokens = max_prompt_tokens
        self.curriculum = curriculum
        self._all: list[Prompt] | None = None

    def prompts(self, split: Split = "all") -> list[Prompt]:
        """All prompts of a side, in the source's order."""
        if self._all is None:
            self._all = list(self.source)
        return load_prompts(self._all, split, self.held_out_fraction, self.tokenizer, self.chat, self.max_prompt_tokens)

    def train_prompts(self, n: int | None = None) -> list[Prompt]:
        """The training side, in the source's order; at most `n`, spread evenly over it."""
        prompts = self.prompts("train")
        if n is None or n >= len(prompts):
            return prompts
        return [prompts[i * len(prompts) // n] for i in range(n)]

    def test_prompts(self, n: int | None = None) -> list[Prompt]:
        """The held-out side, ordered by id, so that the first `n` are the same sample in every run."""
        prompts = sorted(self.prompts("test"), key=lambda prompt: prompt.id)
        if n is not None and n > len(prompts):
            log.warning("%d held-out problems wanted, %d exist: raise the source's size", n, len(prompts))
        return prompts[:n]
