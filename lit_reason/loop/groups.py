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
    groups = []
    for g, prompt in enumerate(prompts):
        rows = slice(g * G, (g + 1) * G)
        messages = {(b - rows.start, n): m for (b, n), m in scores.messages.items() if rows.start <= b < rows.stop}
        part = replace(scores, values_BR=scores.values_BR[rows], states_BR=scores.states_BR[rows], messages=messages)
        groups.append(RolloutGroup(prompt, completions[rows], part))
    return groups


def join(groups: Sequence[RolloutGroup]) -> Scores:
    """The scores of all groups' completions, in their order."""
    parts, messages, row = [group.scores for group in groups], {}, 0
    for part in parts:
        messages |= {(row + b, name): text for (b, name), text in part.messages.items()}
        row += len(part.values_BR)
    values_BR, states_BR = (torch.cat([getattr(part, name) for part in parts]) for name in ("values_BR", "states_BR"))
    return replace(parts[0], values_BR=values_BR, states_BR=states_BR, messages=messages)


def greedy_rewards(groups: Sequence[RolloutGroup]) -> Tensor | None:
    """The rewards of each row's greedy completion, (B, R); None where none was generated."""
    if any(group.greedy_R is None for group in groups):
        return None
    return torch.stack([group.greedy_R for group in groups for _ in group.completions if group.greedy_R is not None])
