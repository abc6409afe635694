"""Greedy decoding with drafts from the model's first multi-token-prediction module (2412.19437 section 5.4.3).

    step:   [token, draft] at positions p, p+1  ->  trunk  ->  what really follows each
            the first always counts; the second does if the first equals the draft
            both states and their next tokens  ->  module  ->  the next draft

The tokens are those of plain greedy decoding, but for ties within rounding; only the number of steps differs. Every
prompt is read once per row: greedy requests rarely repeat one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lit_kernels.sizes import round_up
from torch import Tensor

from lit_reason.models import Transformer
from lit_reason.rollout.sampling import Sampling, draw

Rows = list[tuple[list[int], list[float], bool]]


class Emitted:
    """What B rows have produced so far.

    Args:
        limit_B: the most tokens each row may produce.
        stop_ids: tokens that end a row.
    """

    def __init__(self, limit_B: Tensor, stop_ids: Tensor) -> None:
        B, T, device = len(limit_B), int(limit_B.max()), limit_B.device
        self.limit_B = limit_B
        self.tokens_BT = torch.zeros(B, T, dtype=torch.int64, device=device)
        self.logprobs_BT = torch.zeros(B, T, device=device)
        self.count_B = torch.zeros(B, dtype=torch.int64, device=device)
        self.stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        self.alive_B = torch.ones(B, dtype=torch.bool, device=device)
        self.stop_ids = stop_ids

    def add(self, row_R: Tensor, token_R: Tensor, logprob_R: Tensor, counts_R: Tensor) -> int:
        """One token to each row of `row_R` that is alive and of which `counts_R` says that it counts; how many."""
        kept = counts_R & self.alive_B[row_R]
        row, token = row_R[kept], token_R[kept]
        self.tokens_BT[row, self.count_B[row]] = token
        self.logprobs_BT[row, self.count_B[row]] = logprob_R[kept]
        self.count_B[row] += 1
        self.stopped_B[row] = torch.isin(token, self.stop_ids)
        self.alive_B[row] = ~self.stopped_B[row] & (self.count_B[row] < self.limit_B[row])
        return row.numel()

    def rows(self) -> Rows:
        counts, stops = self.count_B.tolist(), self.stopped_B.tolist()
        tokens, logprobs = self.tokens_BT.tolist(), self.logprobs_BT.tolist()
        return [(tokens[b][:n], logprobs[b][:n], stops[b]) for b, n in enumerate(counts)]


def generate_with_drafts(
    model: Transformer,
    prompts: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    stop_ids: Tensor,
    report: Callable[[int, int], None],
) -> tuple[Rows, int, int]:
    """Greedy completions of `prompts`, all decoded in step.

    Args:
        limits: the most tokens of each prompt; the model's context has room for them.
        report: told after each step how many tokens it made and how many rows are finished.

    Returns:
        Token ids, log-probs and "a stop token ended it" of each prompt; drafts made for live
        rows, and those that gave a token.
    """
    device, room = model.device, model.config.max_seq_len
    length_B = torch.tensor([len(ids) for ids in prompts], device=device)
    out = Emitted(torch.tensor(limits, device=device), stop_ids)
    row = torch.arange(len(prompts), device=device)
    cache = model.new_cache(len(prompts), int(length_B.max()), draft=True)
    token, logprob, draft = _prefill(model, prompts, length_B, cache)
    out.add(row, token, logprob, out.alive_B)
    position, drafted, accepted, made = length_B, 0, 0, 0
    while True:
        live_R = out.alive_B[row]
        live, total = int(live_R.sum()), int(out.count_B.sum())
        report(total - made, len(prompts) - live)
        made = total
        if live == 0:
            return out.rows(), drafted, accepted
        if round_up(live) < row.numel():
            kept = (~live_R).argsort(stable=True)[: round_up(live)]
            cache.select(kept)
            row, token, draft, position = row[kept], token[kept], draft[kept], position[kept]
        at = position.clamp_max(room - 2)  # of finished rows that are still here
        cursor = model.cursor(torch.stack((at, at + 1), dim=1), cache)
        states_R2D = model.decode_states(torch.stack((token, draft), dim=1), cursor)
        next_R2, logprob_R2 = _greedy(model.head(states_R2D))
        hit = next_R2[:, 0] == draft
        drafted += out.add(row, next_R2[:, 0], logprob_R2[:, 0], out.alive_B[row])
        accepted += out.add(row, next_R2[:, 1], logprob_R2[:, 1], hit)
        drafts_R2 = model.draft(states_R2D, next_R2, cursor).argmax(-1)
        last = hit.long()[:, None]
        token, draft = next_R2.gather(1, last).squeeze(1), drafts_R2.gather(1, last).squeeze(1)
        position = position + 1 + hit


def _prefill(model: Transformer, prompts: Sequence[tuple[int, ...]], length_B: Tensor, cache) -> tuple[Tensor, ...]:
    """The first token of each row, its log-prob, and the draft of the second."""
    padded_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
    padded_BT = padded_BT.to(length_B.device)
    row, last = torch.arange(len(prompts), device=length_B.device), length_B - 1
    hidden = model.hidden(padded_BT, cache=cache)
    token, logprob = _greedy(model.head(hidden.states_BTD[row, last])[:, None])
    next_BT = padded_BT.roll(-1, dims=1)
    next_BT[row, last] = token.squeeze(1)
    draft = model.head(model.prefill_draft(hidden, next_BT, cache)[row, last]).argmax(-1)
    return token.squeeze(1), logprob.squeeze(1), draft


def _greedy(logits_BKV: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely tokens and their log-probs, both (B, K)."""
    flat = logits_BKV.flatten(0, 1)
    token, logprob = draw(flat, Sampling(temperature=0), torch.zeros(len(flat), device=flat.device))
    return token.view(logits_BKV.shape[:2]), logprob.view(logits_BKV.shape[:2])
