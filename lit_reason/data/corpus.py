"""Plain arithmetic text for pretraining: worked problems without chat tags, and number facts between them.

A document is one problem (question, steps, answer; one line each) or a few lines of facts. Documents are packed end to
end, `<bos> document <stop>`, into rows of fixed length.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lit_reason.data.arithmetic import Writer
from lit_reason.data.questions import held_out, prompt_id
from lit_reason.data.solvers import STYLES, fact, solve
from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt

# the wordings of the tasks whose questions a single fact can spell
FACT_QUESTIONS = (
    "State the final answer to the following arithmetic problem: {} =",
    "Calculate {}.",
    "Solve the following multiplication: {}. Give only the result as your final answer.",
)


def documents(
    prompts: Sequence[Prompt],
    held_out_fraction: float,
    style: str = "steps",
    facts_fraction: float = 0.2,
    max_digits: int = 2,
    bare_fraction: float = 0.5,
    seed: int = 0,
) -> Iterator[str]:
    """One document per prompt that is not held out, in a shuffled order, with documents of facts strewn in.

    Args:
        prompts: solvable ones; a held-out one is left out here, whatever the caller did before.
        held_out_fraction: of the split; a fact that spells a held-out question is left out too.
        style: how sums are worked out, a key of `STYLES`.
        facts_fraction: share (0..1) of documents that are facts.
        max_digits: of the numbers in facts.
        bare_fraction: share (0..1) of problems put as the bare expression (`12 + 7 - 30`) where they have one: the
            same arithmetic in fewer tokens than the task's wording.
        seed: of order and facts; the same arguments give the same text.
    """
    if not 0.0 <= facts_fraction < 1.0:
        raise ConfigError(f"got facts_fraction={facts_fraction}; give a number from 0 to below 1, e.g. 0.2")
    if not 0.0 <= bare_fraction <= 1.0:
        raise ConfigError(f"got bare_fraction={bare_fraction}; give a number from 0 to 1, e.g. 0.5")
    rng = random.Random(seed)
    allowed = [prompt for prompt in prompts if not held_out(prompt.id, held_out_fraction)]
    rng.shuffle(allowed)
    for prompt in allowed:
        while rng.random() < facts_fraction:
            if lines := facts(rng, held_out_fraction, STYLES[style], max_digits):
                yield lines
        solution = solve(prompt, style)
        if solution is None:
            raise DataError(f"no worked solution for a prompt of {prompt.source}; leave it out of the pretraining text")
        bare = fact(prompt, "expression") if rng.random() < bare_fraction else None
        yield "\n".join((bare or prompt.question, *filter(None, solution)))


def facts(rng: random.Random, held_out_fraction: float, write: Writer, max_digits: int, n: int = 8) -> str:
    """Up to `n` lines such as `7+8=15`, `12-30=-18`, `6*7=42`; multiplication of one-digit numbers only."""
    lines = []
    for _ in range(n):
        op = rng.choice("++--*")
        a, b = _number(rng, 1 if op == "*" else max_digits), _number(rng, 1 if op == "*" else max_digits)
        if not _is_held_out(f"{a} {op} {b}", held_out_fraction):
            lines.append(write(a, op, b))
    return "\n".join(lines)


def _number(rng: random.Random, max_digits: int) -> int:
    return rng.randrange(10 ** rng.randint(1, max_digits))


def _is_held_out(expression: str, fraction: float) -> bool:
    return any(held_out(prompt_id(question.format(expression)), fraction) for question in FACT_QUESTIONS)


def pack(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int) -> Tensor:
    """int64 (rows, seq_len + 1): the documents end to end; an incomplete last row is dropped.

    Row r serves `seq_len` next-token predictions: inputs `row[:-1]`, targets `row[1:]`.
    """
    if seq_len < 2:
        raise ConfigError(f"got seq_len={seq_len}; give at least 2 tokens, e.g. 256")
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    pieces = [np.asarray([*head, *tokenizer.encode(text), tokenizer.stop_ids[0]], dtype=np.int64) for text in texts]
    stream = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    rows = len(stream) // (seq_len + 1)
    if rows == 0:
        raise DataError(
            f"{len(stream)} tokens of text do not fill one row of seq_len={seq_len}; "
            "give more prompts (data.source.size) or a smaller seq_len"
        )
    return torch.from_numpy(stream[: rows * (seq_len + 1)].reshape(rows, seq_len + 1))
