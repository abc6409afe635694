"""Groups of completions with their scores: cut apart, put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_reason.types import Completion, Prompt, RolloutGroup, Scores


def cut(prompts: Sequence[Prompt], completions: Sequence[Completion], scores: Scores) -> list[RolloutGroup]:
    """One group per prompt, from completions that lie group by group."""
    G = len(completions) // max(len(prompts), 1)
    parts = apart(scores, G)
    return [RolloutGroup(p, completions[g * G : (g + 1) * G], parts[g]) for g, p in enumerate(prompts)]


def apart(scores: Scores, G: int) -> list[Scores]:
    """Scores of G rows each."""
    parts = []
    for start in range(0, len(scores.values_BR), G):
        rows = slice(start, start + G)
        messages = {(b - start, n): m for (b, n), m in scores.messages.items() if start <= b < start + G}
        parts.append(
            replace(scores, values_BR=scores.values_BR[rows], states_BR=scores.states_BR[rows], messages=messages)
        )
    return parts


def join(groups: Sequence[RolloutGroup]) -> Scores:
    """The scores of all groups' completions, in their order."""
    return together([group.scores for group in groups])


def with_greedy(groups: Sequence[RolloutGroup]) -> Scores:
    """Everything that was judged: `join`, then the greedy completions' scores."""
    return together([group.scores for group in groups] + [group.greedy for group in groups if group.greedy is not None])


def together(parts: Sequence[Scores]) -> Scores:
    """The rows of all parts, in their order."""
    messages, row = {}, 0
    for part in parts:
        messages |= {(row + b, name): text for (b, name), text in part.messages.items()}
        row += len(part.values_BR)
    values_BR, states_BR = (torch.cat([getattr(part, name) for part in parts]) for name in ("values_BR", "states_BR"))
    return replace(parts[0], values_BR=values_BR, states_BR=states_BR, messages=messages)


def greedy_rewards(groups: Sequence[RolloutGroup]) -> Tensor | None:
    """The rewards of each row's greedy completion, (B, R); None where none was generated."""
    parts = [group.greedy for group in groups for _ in group.completions if group.greedy is not None]
    return torch.cat([part.values_BR for part in parts]) if parts else None
