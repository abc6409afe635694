"""Worked solutions as token pairs, for supervised priming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lit_reason.data.chat import ChatTemplate, default_chat
from lit_reason.data.questions import held_out, prompt_id
from lit_reason.data.solvers import SOLVERS, solve
from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt

Pair = tuple[list[int], list[int]]


def priming(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    chat: ChatTemplate | None = None,
    style: str = "steps",
    terse_fraction: float = 0.0,
    terse_min_lines: int = 1,
) -> list[Pair]:
    """(prompt ids, completion ids) of each prompt, in order; the completion ends in the stop token.

    The thought is the prompt's own `meta["thought"]` where it has one (GSM8K, a user's JSONL with a thought field),
    else a solver's. A prompt that has neither is an error: a priming set must not shrink in silence.

    Args:
        terse_fraction: share (0..1) of prompts, by their hash, whose thought is left empty. A policy primed on both
            kinds has yet to find out, by reinforcement learning, that working a problem out pays.
        terse_min_lines: only thoughts of at least this many lines are left empty: 2 leaves one-step problems alone.
    """
    if not 0.0 <= terse_fraction <= 1.0:
        raise ConfigError(f"got terse_fraction={terse_fraction}; give a number from 0 to 1, e.g. 0.5")
    chat = chat or default_chat(tokenizer)
    pairs: list[Pair] = []
    unsolved: Counter[str] = Counter()
    for prompt in prompts:
        solution = solve(prompt, style)
        if solution is None:
            unsolved[prompt.source] += 1
            continue
        thought, answer = solution
        long = len(thought.splitlines()) >= terse_min_lines
        if long and held_out(prompt_id(f"terse {prompt.id}"), terse_fraction):  # the split's hash, of another text
            thought = ""
        pairs.append((chat.prompt_ids(tokenizer, prompt.question), chat.solution_ids(tokenizer, thought, answer)))
    if unsolved:
        counts = ", ".join(f"{n} of {source}" for source, n in sorted(unsolved.items()))
        raise DataError(
            f"no worked solution for {counts}. Solvers exist for: {', '.join(sorted(SOLVERS))}. "
            'For other problems give a JSONL with "question", "thought" and "answer" (lit_reason.data.JSONL).'
        )
    return pairs
