"""The builtin engine: batched generation with a KV cache on one copy of the policy.

    prompts -> prefill each distinct prompt once -> fan out to its samples -> decode a token a row and step
            -> rows that finished leave the batch -> completions in the order asked

It drives three methods that a model implements: `new_cache(rows, capacity)`, `prefill(ids_BT, length_B, cache)` and
`decode(token_B, position_B, cache)`.

Greedy requests of a model with multi-token prediction take the same way with drafts (`speculative.py`).

Left out: continuous batching (a chunk's last row is waited for) and paged caches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import ConfigError, RolloutError
from lit_reason.models import CausalLM, Transformer
from lit_reason.models.adapters import adapters, merged_copy, merged_weights
from lit_reason.models.layers import round_up
from lit_reason.rollout.engine import OnProgress, Progress
from lit_reason.rollout.sampling import Sampling, draw, uniforms
from lit_reason.rollout.speculative import generate_with_drafts
from lit_reason.types import Completion, Prompt

_COMPACT_BELOW = 0.8  # share of live rows under which copying the cache costs less than decoding the dead ones


class BuiltinEngine:
    """Generates with a copy of the policy in `dtype`, adapters folded in; in float32 with the policy itself, no copy
    made, unless it has adapters.

    Example::

        engine = BuiltinEngine(tokenizer)
        engine.push(model, version=0)
        completions = engine.generate(prompts, Sampling(max_tokens=32), seeds=range(len(prompts)))

    Args:
        tokenizer: for the stop tokens and the completions' text.
        dtype: `"bfloat16"` or `"float32"`.
        max_rows: the most sequences that are decoded together.
        speculative: greedy requests (temperature 0) are decoded with drafts from the model's multi-token-prediction
            module: the same tokens in fewer steps. `drafted` and `accepted` count the drafts.
    """

    def __init__(
        self, tokenizer: Tokenizer, dtype: str = "bfloat16", max_rows: int = 512, speculative: bool = False
    ) -> None:
        dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        if dtype not in dtypes:
            raise ConfigError(f"rollout.engine.dtype={dtype!r}: valid {', '.join(dtypes)}")
        if max_rows < 1:
            raise ConfigError(f"rollout.engine.max_rows={max_rows}: must be at least 1")
        self.tokenizer, self.dtype, self.max_rows = tokenizer, dtypes[dtype], max_rows
        self.speculative, self.drafted, self.accepted = speculative, 0, 0
        self._model: nn.Module | None = None
        self._shares = False  # whether `_model` is the policy itself
        self._version = -1

    def version(self) -> int:
        return self._version

    @property
    def model(self) -> CausalLM:
        """The weights that generate. Raises RolloutError before the first push."""
        if self._model is None:
            raise RolloutError("the engine has no weights yet: call engine.push(model, version) first")
        return cast(CausalLM, self._model)

    @torch.no_grad()
    def push(self, model: nn.Module, version: int) -> None:
        if not isinstance(model, CausalLM):
            raise RolloutError(
                f"the builtin engine runs a lit_reason.models.CausalLM, got {type(model).__name__}: wrap a model of "
                "transformers in lit_reason.models.HFModel(model)"
            )
        if self.speculative and not isinstance(model, Transformer):
            raise ConfigError(
                f"rollout.engine.speculative=true: a {type(model).__name__} has no multi-token-prediction module that "
                "could draft. Type rollout.engine.speculative=false"
            )
        if self.speculative and not model.config.mtp_depth:
            raise ConfigError(
                "rollout.engine.speculative=true: the model has no multi-token-prediction module (model.mtp_depth=0) "
                "that could draft. Type rollout.engine.speculative=false, or pretrain with model.mtp_depth=1"
            )
        shared, self._shares = self._shares, self.dtype == torch.float32 and not adapters(model)
        if self._shares:
            self._model = model
        elif self._model is None or shared or self.model.config != model.config:
            self._model = merged_copy(model).to(self.dtype).requires_grad_(False).eval()
        else:
            sources = merged_weights(model)
            for name, target in (*self._model.named_parameters(), *self._model.named_buffers()):
                target.copy_(sources[name])
        self._version = version

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[Completion]:
        if len(seeds) != len(prompts):
            raise RolloutError(f"got {len(prompts)} prompts and {len(seeds)} seeds: one seed per completion is needed")
        limit = self.model.config.max_seq_len
        for prompt in prompts:
            if not 0 < len(prompt.token_ids) < limit:
                raise RolloutError(
                    f"prompt {prompt.id} has {len(prompt.token_ids)} tokens; valid 1..{limit - 1} "
                    f"(model.max_seq_len={limit} leaves at least one token for the answer)"
                )
        sample_idx = sample_idx if sample_idx is not None else [0] * len(prompts)
        module = cast(nn.Module, self._model)
        was_training = module.training
        module.eval()
        meter = _Meter(len(prompts), progress)
        completions: list[Completion] = []
        try:
            for start in range(0, len(prompts), self.max_rows):
                rows = slice(start, start + self.max_rows)
                ids = [p.token_ids for p in prompts[rows]]
                if self.speculative and sampling.temperature == 0:
                    out = self._chunk_with_drafts(ids, sampling, meter)
                else:
                    out = self._chunk(ids, sampling, seeds[rows], meter)
                for prompt, idx, seed, (ids, logprobs, stopped) in zip(
                    prompts[rows], sample_idx[rows], seeds[rows], out, strict=True
                ):
                    text = self.tokenizer.decode(ids[:-1] if stopped else ids)
                    finish = "stop" if stopped else "length"
                    completions.append(
                        Completion(prompt.id, idx, tuple(ids), tuple(logprobs), text, finish, self._version, seed)
                    )
        finally:
            module.train(was_training)
        return completions

    def _chunk(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seeds: Sequence[int], meter: _Meter
    ) -> list[tuple[list[int], list[float], bool]]:
        """Token ids, log-probs and "a stop token ended it" of each prompt. All of a chunk's rows decode in step."""
        model, device = self.model, self.model.device
        B, room = len(prompts), self.model.config.max_seq_len
        steps = min(sampling.max_tokens, room - min(map(len, prompts)))
        cache, logits_BV = self._prefill(prompts)
        tokens_BT = torch.zeros(B, steps, dtype=torch.int64, device=device)
        logprobs_BT = torch.zeros(B, steps, device=device)
        count_B = torch.zeros(B, dtype=torch.int64, device=device)
        stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        stop_ids = torch.tensor(self.tokenizer.stop_ids, device=device)
        uniform_BT = uniforms(seeds, steps).to(device)

        row = torch.arange(B, device=device)  # the live rows of the batch, as indices into the chunk
        length = torch.tensor([len(p) for p in prompts], device=device)
        alive, live = torch.ones(B, dtype=torch.bool, device=device), B
        for step in range(steps):
            token, logprob = draw(logits_BV, sampling, uniform_BT[row, step])
            tokens_BT[row, step], logprobs_BT[row, step] = token, logprob
            count_B[row] += alive
            stop = torch.isin(token, stop_ids) & alive
            stopped_B[row] |= stop
            position = length + step
            alive = alive & ~stop & (position + 1 < room)
            drawn, live = live, int(alive.sum())
            meter.update(tokens=drawn, finished=B - live)
            if live == 0 or step + 1 == steps:
                break
            if round_up(live) < _COMPACT_BELOW * row.numel():
                kept = (~alive).argsort(stable=True)[: round_up(live)]
                cache.select(kept)
                row, length, token, position = row[kept], length[kept], token[kept], position[kept]
                alive = alive[kept]
            logits_BV = model.decode(token, position.clamp_max(room - 1), cache)
        meter.chunk_done(B)
        counts, stops = count_B.tolist(), stopped_B.tolist()
        tokens, logprobs = tokens_BT.tolist(), logprobs_BT.tolist()
        return [(tokens[b][: counts[b]], logprobs[b][: counts[b]], stops[b]) for b in range(B)]

    def _chunk_with_drafts(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, meter: _Meter
    ) -> list[tuple[list[int], list[float], bool]]:
        stop_ids = torch.tensor(self.tokenizer.stop_ids, device=self.model.device)
        model = cast(Transformer, self._model)  # `push` refuses another
        rows, drafted, accepted = generate_with_drafts(model, prompts, sampling.max_tokens, stop_ids, meter.update)
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        meter.chunk_done(len(prompts))
        return rows

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Any, Tensor]:
        """Reads each distinct prompt once, then fans its cache and logits out to every row that has it."""
        device = self.model.device
        first = {ids: i for i, ids in enumerate(dict.fromkeys(prompts))}
        length = torch.tensor([len(ids) for ids in first], device=device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in first], batch_first=True).to(device)
        cache = self.model.new_cache(len(first), padded.shape[1])
        logits_PV: Tensor = self.model.prefill(padded, length, cache)
        fan_out = torch.tensor([first[ids] for ids in prompts], device=device)
        cache.select(fan_out)
        return cache, logits_PV[fan_out]


class _Meter:
    """Counts tokens and finished rows, and reports about twice a second."""

    def __init__(self, total: int, report: OnProgress | None) -> None:
        self.total, self.report = total, report
        self.done, self.tokens = 0, 0
        self.start = self.last = time.perf_counter()

    def update(self, tokens: int, finished: int) -> None:
        self.tokens += tokens
        now = time.perf_counter()
        if self.report is not None and now - self.last > 0.5:
            self.last = now
            self.report(Progress(self.done + finished, self.total, self.tokens, now - self.start))

    def chunk_done(self, rows: int) -> None:
        self.done += rows
        if self.report is not None and self.done == self.total:
            self.report(Progress(self.done, self.total, self.tokens, time.perf_counter() - self.start))
