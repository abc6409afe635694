"""Golden log-probabilities: fixed token ids and what the saved model says of them, recomputed by `verify`.

They catch what a hash cannot: a change in the code, or a library, that makes the same weights another model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_reason.errors import ZooError

# Log-probs are computed in fp32 whatever the weights' dtype: only the order of sums differs between machines.
TOLERANCE = 1e-4


def default_sequences(vocab_size: int, max_seq_len: int, count: int = 4, length: int = 32) -> list[list[int]]:
    """Fixed token ids spread over the vocabulary; 7919 and 104729 are primes, so that rows differ."""
    length = min(length, max_seq_len)
    return [[(i * 7919 + t * t * 104_729 + t) % vocab_size for t in range(length)] for i in range(1, count + 1)]


@torch.no_grad()
def next_token_logprobs(model: nn.Module, token_ids: Sequence[int]) -> list[float]:
    """log p(token t+1 | tokens 0..t) in nats for each t, fp32, evaluation mode, no autocast.

    Args:
        token_ids: T token ids; T - 1 values come back.
    """
    device = next(model.parameters()).device
    ids_1T = torch.tensor([list(token_ids)], device=device)
    with torch.autocast(device.type, enabled=False):
        logprobs_TV = model(ids_1T)[0].float().log_softmax(-1)
    return logprobs_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0].tolist()


def make_golden(model: nn.Module, sequences: Sequence[Sequence[int]], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The content of golden.json."""
    if not sequences or min(map(len, sequences)) < 2:
        raise ZooError("golden: give at least one sequence of 2 or more token ids, or None for fixed ones")
    reference = copy.deepcopy(model).float().eval()
    cases = [{"token_ids": list(map(int, ids)), "logprobs": next_token_logprobs(reference, ids)} for ids in sequences]
    return {"tolerance": tolerance, "cases": cases}


def worst_error(model: nn.Module, golden: Mapping[str, Any]) -> float:
    """Largest |log-prob - golden| in nats; NaN compares as infinite."""
    reference = copy.deepcopy(model).float().eval()
    worst = 0.0
    for case in golden["cases"]:
        got = torch.tensor(next_token_logprobs(reference, case["token_ids"]), dtype=torch.float64)
        error = (got - torch.tensor(case["logprobs"], dtype=torch.float64)).abs()
        worst = max(worst, error.nan_to_num(nan=torch.inf).max().item())
    return worst
