"""What a round is watched by: rewards, lengths, and the time that its parts took."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_reason.loop.groups import join
from lit_reason.types import Completion, RolloutGroup


def round_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Rewards per column and faults, over the rows that every verifier could judge; lengths."""
    scores, completions = join(groups), [completion for group in groups for completion in group.completions]
    valid_B = scores.valid_B
    metrics: dict[str, float] = {}
    for r, name in enumerate(scores.names):
        column = scores.values_BR[valid_B, r]
        metrics[f"reward/{name}/mean"] = column.mean().item()
        metrics[f"reward/{name}/std"] = column.std(correction=0).item()
    metrics["reward/faults"] = float((~valid_B).sum())
    lengths = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.float32)
    metrics["completion/length"] = lengths.mean().item()
    metrics["completion/truncated"] = sum(c.finish_reason == "length" for c in completions) / len(completions)
    return metrics


def token_ages(completion: Completion, version: int) -> Tensor:
    """(T,) float32, rounds between the weights that wrote each of the policy's own tokens and those of `version`."""
    ages_T = torch.full((len(completion.token_ids),), float(version - completion.version))
    for token, switched in completion.switches:
        ages_T[token:] = version - switched
    return ages_T if completion.mask is None else ages_T[torch.tensor(completion.mask) > 0]


def age_metrics(groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
    """How old the tokens are in a round that trains the weights of `version`."""
    ages_N = torch.cat([token_ages(completion, version) for group in groups for completion in group.completions])
    return {"rollout/age/mean": ages_N.mean().item(), "rollout/age/max": ages_N.max().item()}


def advantage_metrics(advantages_B: Tensor, valid_B: Tensor, G: int) -> dict[str, float]:
    """Groups without a signal, and the spread of the advantages."""
    silent_P = (advantages_B.unflatten(0, (-1, G)).abs() < 1e-6).all(1)  # batch norms leave rounding
    return {
        "reward/zero_std_fraction": silent_P.float().mean().item(),
        "advantage/std": advantages_B[valid_B].std(correction=0).item(),
    }


class Clock:
    """Wall time of a round's parts. Training is that of the round before: it ends when this one begins.

    Args:
        training_since: when the round before began to train (s), None in a process's first round.
        training_tokens: completion tokens that it trained on, over all its epochs.

    `generate` and `score` are measured where they run, which may be beside training; `wait` is what training waited for
    them.
    """

    def __init__(self, training_since: float | None = None, training_tokens: int = 0) -> None:
        self.last = time.perf_counter()
        self.train = self.last - training_since if training_since is not None else None
        self.training_tokens = training_tokens
        self.laps: dict[str, float] = dict.fromkeys(("sync", "wait", "generate", "score", "prepare"), 0.0)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] += now - self.last
        self.last = now

    def rates(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Of this process; with several, all their tokens over its own time."""
        completions = [completion for group in groups for completion in group.completions]
        tokens = sum(len(c.token_ids) for c in completions)
        rates = {
            "speed/generate_tokens_per_s": tokens / max(self.laps["generate"], 1e-9),
            "speed/score_per_s": len(completions) / max(self.laps["score"], 1e-9),
            "speed/sync_s": self.laps["sync"],
            "speed/wait_s": self.laps["wait"],
        }
        if self.train:
            rates["speed/train_tokens_per_s"] = self.training_tokens / self.train
        return rates
