"""The builtin engine: continuous batching with a KV cache on one copy of the policy.

    prompts -> each distinct prompt read once -> a token a row and step -> rows that finished leave, waiting ones enter
            -> completions in the order asked

It drives what a model implements (`models/protocol.py`); ours keep their latents in cohorts (`models/cohorts.py`).

Greedy requests of a model with multi-token prediction take another way, with drafts (`speculative.py`).

Left out: captured or compiled steps. A step on a CPU costs its products, and there was no GPU to measure one on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from lit_kernels.swap import all_off
from torch import Tensor, nn

from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import ConfigError, RolloutError
from lit_reason.models import CausalLM, Transformer
from lit_reason.models.adapters import adapters, merged_copy, merged_weights, plain_name
from lit_reason.rollout.batch import Ids
from lit_reason.rollout.continuous import Row, generate_rows
from lit_reason.rollout.engine import Held, NextToken, OnProgress, Progress, check_requests, held_as_is, most_tokens
from lit_reason.rollout.experts import ExpertLog
from lit_reason.rollout.sampling import Sampling
from lit_reason.rollout.speculative import generate_with_drafts
from lit_reason.types import Completion, Prompt


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
        max_rows: the most sequences that are decoded together; further ones enter as rows finish.
        speculative: greedy requests (temperature 0) are decoded with drafts from the model's multi-token-prediction
            module: the same tokens in fewer steps. `drafted` and `accepted` count the drafts.
        return_experts: completions carry the experts that were chosen for every token (`Completion.experts_SLK`), of
            a model with experts, so that training can replay them; not those decoded with drafts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: str = "bfloat16",
        max_rows: int = 512,
        speculative: bool = False,
        return_experts: bool = True,
    ) -> None:
        dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        if dtype not in dtypes:
            raise ConfigError(f"rollout.engine.dtype={dtype!r}: valid {', '.join(dtypes)}")
        if max_rows < 1:
            raise ConfigError(f"rollout.engine.max_rows={max_rows}: must be at least 1")
        self.tokenizer, self.dtype, self.max_rows = tokenizer, dtypes[dtype], max_rows
        self.speculative, self.drafted, self.accepted = speculative, 0, 0
        self.return_experts = return_experts
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

    def prefix_block(self) -> int:
        """It keeps no keys and values from one call to the next."""
        return 0

    @torch.no_grad()
    def truth(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Provable.truth`: parameters in the engine's dtype but for the routers', buffers as they are."""
        parameters = {plain_name(name) for name, _ in model.named_parameters()}
        for name, tensor in merged_weights(model).items():
            yield name, tensor.to(self.dtype) if name in parameters and ".router." not in name else tensor

    def held(self) -> Mapping[str, Held]:
        module = cast(nn.Module, self.model)
        return held_as_is((*module.named_parameters(), *module.named_buffers()))

    @torch.inference_mode()
    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        with self._own_kernels():
            return [self._next_token(ids, top) for ids in prompts]

    def _next_token(self, ids: Sequence[int], top: int) -> NextToken:
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        cache = self.model.new_cache(1, len(ids))
        logits_1V = self.model.prefill(ids_1T, torch.tensor([len(ids)], device=ids_1T.device), cache)
        best = logits_1V[0].float().log_softmax(-1).topk(top)
        return NextToken(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)), cached=0)

    def _own_kernels(self) -> AbstractContextManager[None]:
        """What training has put into the policy is not for an engine that shares it, as it is not in a copy."""
        return all_off(cast(nn.Module, self._model)) if self._shares else nullcontext()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`.

        Args:
            limits: the most tokens of each completion, where they differ; `sampling.max_tokens` holds as well.
        """
        context = self.model.config.max_seq_len
        check_requests(prompts, seeds, context, limits)
        if not prompts:
            return []
        sample_idx = sample_idx if sample_idx is not None else [0] * len(prompts)
        limits = most_tokens(prompts, sampling, context, limits)
        module = cast(nn.Module, self._model)
        was_training = module.training
        module.eval()
        meter = _Meter(len(prompts), progress)
        ids = [prompt.token_ids for prompt in prompts]
        try:
            with self._own_kernels():
                if self.speculative and sampling.temperature == 0:
                    rows = self._with_drafts(ids, limits, meter)
                else:
                    rows = self._continuous(ids, limits, seeds, sampling, meter)
        finally:
            module.train(was_training)
        meter.end()
        return [self._completion(*asked) for asked in zip(prompts, sample_idx, seeds, rows, strict=True)]

    def _completion(self, prompt: Prompt, sample_idx: int, seed: int, row: Row) -> Completion:
        text = self.tokenizer.decode(row.ids[:-1] if row.stopped else row.ids)
        return Completion(
            prompt.id,
            sample_idx,
            tuple(row.ids),
            tuple(row.logprobs),
            text,
            "stop" if row.stopped else "length",
            self._version,
            seed,
            experts_SLK=row.experts_SLK,
        )

    def _continuous(
        self, ids: Ids, limits: Sequence[int], seeds: Sequence[int], sampling: Sampling, meter: _Meter
    ) -> list[Row]:
        model = self.model
        log = None
        if self.return_experts and isinstance(model, Transformer) and model.config.moe_layers:
            log = ExpertLog(model, len(ids), max(limits))
        stop_ids = torch.tensor(self.tokenizer.stop_ids, device=model.device)
        with log or nullcontext():
            return generate_rows(model, ids, limits, seeds, sampling, stop_ids, self.max_rows, meter.update, log)

    def _with_drafts(self, ids: Ids, limits: Sequence[int], meter: _Meter) -> list[Row]:
        stop_ids = torch.tensor(self.tokenizer.stop_ids, device=self.model.device)
        model, rows = cast(Transformer, self._model), []  # `push` refuses another
        for start in range(0, len(ids), self.max_rows):
            some = slice(start, start + self.max_rows)
            done = len(rows)
            found, drafted, accepted = generate_with_drafts(
                model,
                ids[some],
                limits[some],
                stop_ids,
                lambda n, finished, done=done: meter.update(n, done + finished),
            )
            self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
            rows += [Row(*row) for row in found]
        return rows


class _Meter:
    """Counts tokens, and reports about twice a second."""

    def __init__(self, total: int, report: OnProgress | None) -> None:
        self.total, self.report, self.tokens = total, report, 0
        self.start = self.last = time.perf_counter()

    def update(self, tokens: int, done: int) -> None:
        self.tokens += tokens
        now = time.perf_counter()
        if self.report is not None and now - self.last > 0.5:
            self.last = now
            self.report(Progress(done, self.total, self.tokens, now - self.start))

    def end(self) -> None:
        if self.report is not None:
            self.report(Progress(self.total, self.total, self.tokens, time.perf_counter() - self.start))
