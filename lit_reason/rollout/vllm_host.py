"""vLLM inside its own process, driven step by step (`worker.Host`). Only that process imports vllm.

Five settings without which vLLM's CPU build is wrong or fails, and raises nothing in three of them: rotary embedding
without its own kernel, the routing method and score in config.json, untied embeddings, CPU_MLA, and log-probs of the
distribution that is sampled.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_reason.rollout.engine import Held, NextToken, Progress
from lit_reason.rollout.sampling import Sampling
from lit_reason.rollout.vllm import logprobs_mode
from lit_reason.rollout.vllm_experts import experts_of
from lit_reason.rollout.vllm_layout import held
from lit_reason.rollout.worker import Generated, Request


class VLLMHost:
    """One `vllm.LLM` with the weights of the last push.

    Args:
        config: config.json of the model.
        stop_ids: tokens that end a completion.
        settings: of `vllm.LLM`.
        return_experts: tell the experts that were chosen.
    """

    def __init__(
        self, config: Mapping[str, Any], stop_ids: Sequence[int], settings: Mapping[str, Any], return_experts: bool
    ) -> None:
        from vllm import LLM

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            self.llm = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, **settings)
        self.engine: Any = self.llm.llm_engine
        self.stop_ids = list(stop_ids)
        self._experts_of = experts_of(self.llm) if return_experts else None
        self.version = -1
        self._names = 0
        self._finished: dict[str, Any] = {}
        self._running: dict[str, list[tuple[int, int]]] = {}  # the versions of each request's tokens: (from, version)
        self._inner: dict[str, str] = {}  # vLLM's own names of requests

    def load(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """New weights for all that comes; what is running goes on with them, from its own tokens."""
        self.llm.collective_rpc(_prepare_reload)
        self.llm.collective_rpc(functools.partial(_reload, tensors=tensors))
        self.flush()
        self.version = version
        for name, versions in self._running.items():
            versions.append((self._length(name), version))

    def flush(self) -> None:
        """Forgets keys and values of the old weights; of running requests too, which compute theirs anew."""
        if not self.engine.reset_prefix_cache(reset_running_requests=bool(self._running)):
            raise RuntimeError(
                "vLLM did not reset its prefix cache: it would go on with keys and values of old weights"
            )

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        alive: Callable[[Progress], None],
    ) -> list[Generated]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.llm.collective_rpc(functools.partial(_set_logprobs, mode=logprobs_mode(sampling.temperature)))
        names = []
        for ids, seed, limit in requests:
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                max_tokens=limit,
                seed=seed,
                logprobs=0,
                stop_token_ids=self.stop_ids,
                ignore_eos=True,  # a config.json that names no end gets one from transformers: DeepSeek's is token 1
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            names.append(self._add(ids, params))
        self._run(names, alive)
        return [self._generated(self._finished.pop(name), self._running.pop(name)) for name in names]

    def held(self) -> Mapping[str, Held]:
        return self.llm.collective_rpc(_held)[0]

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=top, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        names = [self._add(ids, params) for ids in prompts]
        self._run(names, lambda progress: None)
        found = []
        for name in names:
            del self._running[name]
            request = self._finished.pop(name)
            logprobs = {token: float(one.logprob) for token, one in request.outputs[0].logprobs[0].items()}
            found.append(NextToken(logprobs, request.num_cached_tokens or 0))
        return found

    def prefix_block(self) -> int:
        cache = self.engine.vllm_config.cache_config
        return cache.block_size if cache.enable_prefix_caching else 0

    def sleep(self, level: int) -> None:
        """1: weights to the host's memory; 2: dropped, so that only a push brings them back. Both drop the cache."""
        if not self.engine.vllm_config.model_config.enable_sleep_mode:
            raise RuntimeError("vLLM sleeps on a GPU only. Type rollout.shape.sleep=0")
        self.llm.sleep(level)

    def wake(self, tags: list[str] | None = None) -> None:
        self.llm.wake_up(tags)

    def _add(self, ids: Sequence[int], params: Any) -> str:
        self._names += 1
        name = str(self._names)
        self._inner[name] = self.engine.add_request(name, {"prompt_token_ids": list(ids)}, params)
        self._running[name] = [(0, self.version)]
        return name

    def _run(self, names: Sequence[str], alive: Callable[[Progress], None]) -> None:
        """Steps until these requests are finished. What `alive` serves may itself run others."""
        start, waiting = time.perf_counter(), set(names)
        tokens = 0
        while waiting:
            for request in self.engine.step():
                if request.finished:
                    self._take(request)
            done = [name for name in waiting if name in self._finished]
            tokens += sum(len(self._finished[name].outputs[0].token_ids) for name in done)
            waiting.difference_update(done)
            if waiting and not self.engine.has_unfinished_requests():
                raise RuntimeError(f"vLLM lost {len(waiting)} of {len(names)} requests")
            alive(Progress(len(names) - len(waiting), len(names), tokens, time.perf_counter() - start))

    def _take(self, request: Any) -> None:
        self._finished[request.request_id] = request
        inner = self._inner.pop(request.request_id)
        if self._experts_of is not None:
            request.outputs[0].routed_experts = self._experts_of(inner, request)

    def _length(self, name: str) -> int:
        """Tokens that a running request has so far."""
        if name in self._finished:
            return len(self._finished[name].outputs[0].token_ids)
        return self.engine.output_processor.request_states[self._inner[name]].detokenizer.num_output_tokens()

    def _generated(self, request: Any, versions: list[tuple[int, int]]) -> Generated:
        (output,) = request.outputs
        ids = tuple(output.token_ids)
        logprobs = tuple(float(entry[token].logprob) for entry, token in zip(output.logprobs, ids, strict=True))
        stopped = output.finish_reason == "stop"
        switches = tuple((at, version) for at, version in versions[1:] if 0 < at < len(ids))
        first = next(version for at, version in reversed(versions) if at == 0)
        return Generated(ids, logprobs, stopped, first, switches, output.routed_experts)


def _prepare_reload(worker: Any) -> None:
    """vLLM's CPU build lays experts out for its kernel only when it makes the kernel: let it make it anew."""
    if worker.device.type == "cpu":
        for module in worker.model_runner.get_model().modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None


def _reload(worker: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    worker.model_runner.reload_weights(weights_iterator=tensors)
    model = worker.model_runner.get_model()
    if worker.device.type == "cpu" and model.config.tie_word_embeddings:
        # A tied head gets no weights of its own, so vLLM leaves the packed copy that it had of the old ones.
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _held(worker: Any) -> Mapping[str, Held]:
    return held(worker.model_runner.get_model())


def _set_logprobs(worker: Any, mode: str) -> None:
    sampler = worker.model_runner.sampler
    sampler.logprobs_mode = mode
    if hasattr(sampler, "topk_topp_sampler"):  # model runner V2 has none
        sampler.topk_topp_sampler.logprobs_mode = mode
