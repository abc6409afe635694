"""How a token is drawn: temperature, top-p, min-p, and random numbers that belong to the request.

Shapes: B rows, V vocabulary, T steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_reason.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a request.

    Args:
        temperature: divides the logits; 0 is greedy (log-probs are then those at temperature 1).
        top_p: keeps the smallest set of most likely tokens whose probability reaches it.
        min_p: drops tokens less likely than `min_p` times the most likely one.
        max_tokens: the most tokens to generate.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
        }
        for name, (ok, valid) in checks.items():
            if not ok:
                raise ConfigError(f"rollout.sampling.{name}={getattr(self, name)}: must be {valid}")


def request_seed(run_seed: int, step: int, prompt_id: str, sample_idx: int) -> int:
    """A 63-bit seed from what identifies the request, so that an engine needs no random state of its own."""
    text = f"{run_seed}/{step}/{prompt_id}/{sample_idx}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """(B, steps) float64 in [0, 1): entry (b, t) depends on seeds[b] and t alone (splitmix64 as a counter hash)."""
    with np.errstate(over="ignore"):
        state = np.asarray(seeds, dtype=np.uint64)[:, None]
        x = state + np.arange(1, steps + 1, dtype=np.uint64)[None] * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs under the temperature, before top-p and min-p (what a trainer can recompute).

    The token is the inverse of the cumulative distribution at `uniform_B`: one random number a token, whatever V is.

    Returns:
        token_B int64, logprob_B float32 (nats).
    """
    if sampling.temperature == 0:
        probs_BV = logits_BV.softmax(-1, dtype=torch.float32)
        token_B = logits_BV.argmax(-1)
    else:
        probs_BV = (logits_BV.float() / sampling.temperature).softmax(-1)
        cumulative_BV = _truncate(probs_BV, sampling).cumsum(-1, dtype=torch.float64)
        threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
        token_B = token_B.clamp_max(logits_BV.shape[1] - 1)  # NaN logits: their log-prob will say so
    return token_B, probs_BV.gather(1, token_B[:, None]).squeeze(1).log()


def _truncate(probs_BV: Tensor, sampling: Sampling) -> Tensor:
    """Sets the probabilities that top-p and min-p drop to 0; not renormalised."""
    if sampling.min_p > 0:
        probs_BV = probs_BV.masked_fill(probs_BV < sampling.min_p * probs_BV.amax(-1, keepdim=True), 0.0)
    if sampling.top_p < 1:
        ordered_BV, index_BV = probs_BV.sort(-1, descending=True)
        before_BV = ordered_BV.cumsum(-1) - ordered_BV
        dropped_BV = before_BV >= sampling.top_p * ordered_BV.sum(-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(torch.zeros_like(dropped_BV).scatter_(1, index_BV, dropped_BV), 0.0)
    return probs_BV
