"""Continuous batching: rows that finish leave, waiting ones enter, so that the batch stays full.

    waiting requests -> admit: prefill -> [ draw a token a row -> who is done? -> drop, admit -> decode ] -> Rows

What a request gets depends on its prompt, seed and limit, and not on who else is in the batch, but for rounding.

Shapes: R requests, B rows of the batch, T the longest limit, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_reason.models import CausalLM
from lit_reason.rollout.batch import new_batch
from lit_reason.rollout.experts import ExpertLog
from lit_reason.rollout.sampling import Sampling, draw, uniforms

ADMIT_SHARE = 8  # rows enter when 1/8 of the batch is free: a few at a time would make many small prefills and cohorts


class Row(NamedTuple):
    """What one request got; `experts_SLK` as in `Completion`."""

    ids: list[int]
    logprobs: list[float]
    stopped: bool
    experts_SLK: Tensor | None = None


def generate_rows(
    model: CausalLM,
    prompts: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling,
    stop_ids: Tensor,
    max_rows: int,
    report: Callable[[int, int], None],
    log: ExpertLog | None = None,
) -> list[Row]:
    """A row per request.

    Args:
        limits: the most tokens that each request may get.
        max_rows: the most rows that are alive at a time.
        report: told after each step how many tokens it made and how many requests are finished.
        log: is told which experts were chosen, where they are wanted.
    """
    device, R, T = stop_ids.device, len(prompts), max(limits)
    tokens_RT = torch.zeros(R, T + 1, dtype=torch.int64, device=device)  # the last column: rows that are done
    logprobs_RT = torch.zeros(R, T + 1, device=device)
    count_R = torch.zeros(R, dtype=torch.int64, device=device)
    stopped_R = torch.zeros(R, dtype=torch.bool, device=device)
    length_R = torch.tensor([len(ids) for ids in prompts], device=device)
    limit_R = torch.tensor(limits, device=device)
    uniform_RT = torch.nn.functional.pad(uniforms(seeds, T), (0, 1)).to(device)

    batch, logits_BV = new_batch(model), None
    row = torch.empty(0, dtype=torch.int64, device=device)  # the batch's requests
    alive = torch.empty(0, dtype=torch.bool, device=device)
    live = entered = 0
    while live or entered < R:
        if entered < R and (live == 0 or (max_rows - live) * ADMIT_SHARE >= max_rows):
            n = _admitted(prompts, entered, max_rows - live)
            new_BV, prompt_B = batch.admit(prompts[entered : entered + n])
            new = torch.arange(entered, entered + n, device=device)
            if log is not None:
                log.read_prompts(prompt_B, length_R[new])
            logits_BV = new_BV if logits_BV is None else torch.cat((logits_BV, new_BV))
            row, alive = torch.cat((row, new)), torch.cat((alive, torch.ones_like(new, dtype=torch.bool)))
            live, entered = live + n, entered + n
        assert logits_BV is not None
        count = count_R[row]
        token, logprob = draw(logits_BV, sampling, uniform_RT[row, count])
        tokens_RT[row, count], logprobs_RT[row, count] = token, logprob
        count_R[row] = count = count + alive
        stop = torch.isin(token, stop_ids) & alive
        stopped_R[row] |= stop
        alive = alive & ~stop & (count < limit_R[row])
        drawn, live = live, int(alive.sum())
        report(drawn, entered - live)
        if live < drawn and (kept := batch.drop(alive)) is not None:
            row, alive, token, count = row[kept], alive[kept], token[kept], count[kept]
        if live == 0:
            logits_BV = None
            continue
        logits_BV = batch.step(token, length_R[row] + count - 1)
        if log is not None:
            log.read_tokens(row, count - 1)
    counts, stops = count_R.tolist(), stopped_R.tolist()
    tokens, logprobs = tokens_RT.tolist(), logprobs_RT.tolist()
    experts = [None] * R if log is None else log.of_requests(counts)
    return [Row(tokens[r][:n], logprobs[r][:n], stops[r], experts[r]) for r, n in enumerate(counts)]


def _admitted(prompts: Sequence[tuple[int, ...]], start: int, free: int) -> int:
    """How many requests enter: all that fit, but samples of one prompt enter together where that is possible."""
    end = min(start + free, len(prompts))
    cut = end
    while cut > start and end < len(prompts) and prompts[cut - 1] == prompts[end]:
        cut -= 1
    return (cut if cut > start else end) - start
