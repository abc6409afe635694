"""vLLM in servers that run already, on this machine or others, found by URL.

    first push      ask each server what it is; wait for those that still start
    every push      pause all, weights in (`vllm_server_push`), forget old keys and values, new version, go on
    every round     is each one alive and holds our weights?  then deal out the requests (`vllm_server_http`)
    proof           every server is asked

`python -m lit_reason.rollout.vllm_serve FOLDER` prints the command that starts one. Importing this imports no vllm.
Trap: the servers must run with VLLM_SERVER_DEV_MODE=1, so whoever reaches their port can change their weights.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import (
    ConfigError,
    EngineDiedError,
    EngineStalledError,
    RolloutError,
    WeightSyncError,
    nearest,
)
from lit_reason.models.export import checkpoint_tensors
from lit_reason.rollout.engine import Held, NextToken, OnProgress, check_requests, most_tokens
from lit_reason.rollout.hosted import DTYPES, completions_of, throttled
from lit_reason.rollout.process import Deadlines
from lit_reason.rollout.replicas import agreed
from lit_reason.rollout.sampling import Sampling
from lit_reason.rollout.vllm import check_sampling, logprobs_mode
from lit_reason.rollout.vllm_experts import moe_rows
from lit_reason.rollout.vllm_server_facts import check_model, meet
from lit_reason.rollout.vllm_server_http import Fleet, Server
from lit_reason.rollout.vllm_server_push import Files, Nccl, Transfer
from lit_reason.rollout.worker import Generated
from lit_reason.types import Completion, Prompt

log = logging.getLogger(__name__)
TRANSFERS = ("files", "nccl")
START_S = 120.0


class VLLMServerEngine:
    """Servers of vLLM with the policy's weights of the last push.

    Example::

        engine = VLLMServerEngine(tokenizer, urls=["http://localhost:8000", "http://localhost:8001"])
        engine.push(model, version=0)
        completions = engine.generate(prompts, Sampling(max_tokens=32), seeds=range(len(prompts)))

    Args:
        tokenizer: for the stop tokens and the completions' text; servers see token ids only.
        urls: one per server; each has the whole model on one device.
        dtype: what they must compute in; None: what they do.
        transfer: how weights reach them, "files" or "nccl" (`vllm_server_push`).
        folder: of "files": one that trainer and servers see under this name.
        max_parallel: the most requests that a server is given at a time.
        deadlines: seconds by name. start: until all servers answer; generate: without a token; push: of each step of
            a push, the whole transfer being one.

    Raises:
        ConfigError: a setting is wrong, or (by the first push) a server, and what to type.
    """

    in_flight = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        urls: Sequence[str] = ("http://localhost:8000",),
        dtype: str | None = None,
        transfer: str = "files",
        folder: str = "/dev/shm",
        max_parallel: int = 256,
        deadlines: Mapping[str, float] | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"rollout.engine.dtype={dtype!r}: valid {', '.join(DTYPES)}")
        if transfer not in TRANSFERS:
            raise ConfigError(f"rollout.engine.transfer={transfer!r}: {nearest(transfer, TRANSFERS)}")
        whole = not isinstance(urls, str) and all(re.match("https?://.", url) for url in urls)
        if not (urls and whole and len(set(urls)) == len(urls)):
            raise ConfigError(
                f"rollout.engine.urls={urls!r}: a list of URLs, none of them twice. Type "
                "rollout.engine.urls=[http://localhost:8000]"
            )
        self.tokenizer = tokenizer
        self.deadlines = Deadlines.named(deadlines, start=START_S)
        self._asked_dtype = dtype
        self._transfer: Transfer | None = Files(folder) if transfer == "files" else None
        self.fleet = Fleet(urls, max_parallel)
        self._facts: dict[str, Any] = {}
        self._run = secrets.token_hex(4)  # tells our weights from those of another run on the same servers
        self._version = -1

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self._known()["dtype"]]

    def prefix_block(self) -> int:
        return self._known()["block"]

    def version(self) -> int:
        return self._version

    def truth(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return checkpoint_tensors(model, self.dtype)

    def check_sampling(self, sampling: Sampling) -> None:
        """See `HostedEngine.check_sampling`."""
        check_sampling(sampling)

    def push(self, model: nn.Module, version: int) -> None:
        check_model(model, self.dtype, self._known()["config"])
        if self._transfer is None:
            self._transfer = Nccl(next(model.parameters()).device)
        self.fleet.run(lambda _: self._push(model, version))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[Completion]:
        check_sampling(sampling)
        if self._version < 0:
            raise RolloutError("the engine has no weights yet: call engine.push(model, version) first")
        context = self._known()["context"]
        check_requests(prompts, seeds, context)
        bodies = [
            _body(
                prompt.token_ids,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                max_tokens=limit,
                seed=seed,
                logprobs=0,
                stop_token_ids=list(self.tokenizer.stop_ids),
                ignore_eos=True,  # of config.json; the tokenizer's are in stop_token_ids
            )
            for prompt, seed, limit in zip(prompts, seeds, most_tokens(prompts, sampling, context), strict=True)
        ]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt.token_ids, []).append(i)
        mode = logprobs_mode(sampling.temperature)
        found = self.fleet.run(lambda say: self._round(bodies, list(groups.values()), mode, say), throttled(progress))
        generated = [self._generated(one["choices"][0]) for one in found]
        return completions_of(generated, prompts, seeds, sample_idx, self.tokenizer)

    def held(self) -> Mapping[str, Held]:
        """What all servers hold; a tensor in which they differ once for each, under its name, "at" and the URL."""
        answers = self.fleet.run(lambda _: self._each("lit_held"))
        return agreed(
            {
                server.url: {
                    name: Held(dtype, tuple(shape), digest, learnt)
                    for name, (dtype, shape, digest, learnt) in said["held"].items()
                }
                for server, said in answers.items()
            }
        )

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        """Of all prompts what each server says, one server after another."""
        bodies = [_body(ids, temperature=0.0, max_tokens=1, logprobs=top, ignore_eos=True) for ids in prompts]
        answers = self.fleet.run(lambda _: self._probe(bodies))
        return [_next_token(server.url, one) for server, said in answers.items() for one in said]

    def close(self) -> None:
        """Leaves the servers as they are."""
        self.fleet.close()

    def _known(self) -> dict[str, Any]:
        """What the servers said of themselves, asked once."""
        if not self._facts:
            self._facts = self.fleet.run(lambda _: meet(self.fleet, self.deadlines, self._asked_dtype))
        return self._facts

    async def _push(self, model: nn.Module, version: int) -> None:
        async with self.fleet.changing:
            await self._welcome_back()
            servers, within_s = self.fleet.alive, self.deadlines.push

            async def call(method: str, args: Any) -> None:
                rank = {server: i for i, server in enumerate(servers)}
                await self._all(lambda s: self.fleet.call(s, method, *args(rank[s]), within_s=within_s), version)

            async def post(path: str, **request: Any) -> None:
                await self._all(lambda s: self.fleet.ask(s, "POST", path, within_s, **request), version)

            assert self._transfer is not None
            await post("/pause", params={"mode": "keep", "clear_cache": "false"})
            await self._transfer.send(lambda: self.truth(model), [server.url for server in servers], call)
            await self._all(self._flush, version)
            await post("/update_weight_version", json={"new_version": f"{self._run}/{version}"})
            await post("/resume")
            self._version = version

    async def _flush(self, server: Server) -> None:
        params = {"reset_running_requests": "true"}
        said = await self.fleet.ask(server, "POST", "/reset_prefix_cache", self.deadlines.push, params=params)
        if not said["success"]:
            raise RolloutError("did not reset its prefix cache: it would go on with keys and values of old weights")

    async def _all(self, work: Any, version: int) -> None:
        """`work` on every server; of a push: what fails on one of them fails."""
        for server, result in (await self.fleet.each(work)).items():
            if isinstance(result, Exception):
                self._version = -1
                server.lose(result)  # it may hold half of them
                if isinstance(result, EngineStalledError):
                    raise result
                raise WeightSyncError(
                    f"{server.url} did not take the weights of version {version}: {result}"
                ) from result

    async def _welcome_back(self) -> None:
        """Lost servers that answer again, for they are about to get the weights; who dies now is lost."""
        for server in self.fleet.servers:
            try:
                facts = await self.fleet.call(server, "lit_facts", within_s=min(10.0, self.deadlines.push))
            except (EngineDiedError, EngineStalledError) as error:
                if not server.lost:
                    server.lose(error)
                continue
            if server.lost and facts == server.facts:
                log.warning("%s is back", server.url)
                server.lost = ""

    async def _round(self, bodies: list[dict[str, Any]], groups: list[list[int]], mode: str, say: OnProgress) -> Any:
        async with self.fleet.changing:
            ready = await self.fleet.each(lambda server: self._ready(server, mode))
            for server, error in ready.items():
                if isinstance(error, Exception):
                    server.lose(error)
        return await self.fleet.round(bodies, groups, self.deadlines.generate, say)

    async def _ready(self, server: Server, mode: str) -> None:
        """Is it alive, does it hold the weights of our last push?"""
        said = await self.fleet.ask(server, "GET", "/weight_info", self.deadlines.generate)
        if said["weight_version"] != f"{self._run}/{self._version}":
            raise EngineDiedError(
                f"holds weights {said['weight_version']!r} instead of {self._run}/{self._version}: it was restarted, "
                "or another trainer uses it"
            )
        await self.fleet.call(server, "lit_logprobs", mode, within_s=self.deadlines.generate)

    async def _each(self, method: str) -> dict[Server, Any]:
        return self._survivors(
            await self.fleet.each(lambda s: self.fleet.call(s, method, within_s=self.deadlines.push))
        )

    async def _probe(self, bodies: Sequence[dict[str, Any]]) -> dict[Server, list[dict[str, Any]]]:
        async def ask(server: Server) -> list[dict[str, Any]]:
            path, within_s = "/inference/v1/generate", self.deadlines.push
            return await asyncio.gather(*(self.fleet.ask(server, "POST", path, within_s, json=body) for body in bodies))

        return self._survivors(await self.fleet.each(ask))

    def _survivors(self, answers: Mapping[Server, Any]) -> dict[Server, Any]:
        """The answers of those that did not die over the question; raises any other error, or if none is left."""
        for server, answer in answers.items():
            if isinstance(answer, EngineDiedError | EngineStalledError):
                server.lose(answer)
            elif isinstance(answer, Exception):
                raise answer
        return {server: answers[server] for server in self.fleet.alive if server in answers}

    def _generated(self, choice: Mapping[str, Any]) -> Generated:
        if choice["finish_reason"] not in ("stop", "length"):
            raise RolloutError(
                f"a server ended a completion by {choice['finish_reason']!r}: does something else use it?"
            )
        spans = [(span["start"], self._ours(span["version"])) for span in choice["weight_versions"]]
        return Generated(
            tuple(choice["token_ids"]),
            tuple(one["logprob"] for one in choice["logprobs"]["content"]),
            choice["finish_reason"] == "stop",
            spans[0][1],
            tuple(spans[1:]),
            _experts(choice["routed_experts"], self._known()["moe_layers"]),
        )

    def _ours(self, tag: str) -> int:
        run, _, version = tag.partition("/")
        if run != self._run:
            raise WeightSyncError(f"a server generated with weights {tag!r}, which are not of this run ({self._run})")
        return int(version)


def _body(ids: Sequence[int], **sampling: Any) -> dict[str, Any]:
    return {"token_ids": list(ids), "sampling_params": {**sampling, "detokenize": False}}


def _experts(npy: str | None, moe_layers: Sequence[int]) -> np.ndarray | None:
    """int16 (S, L, K) of vLLM's base64 of .npy, which has all layers; unmeasured on a GPU, where alone it is told."""
    if npy is None:
        return None
    return moe_rows(np.load(io.BytesIO(base64.b64decode(npy)), allow_pickle=False), moe_layers)


def _next_token(url: str, answer: Mapping[str, Any]) -> NextToken:
    details = answer["usage"].get("prompt_tokens_details")
    if details is None:
        raise ConfigError(
            f"{url} does not say what it took from its cache: start it with --enable-prompt-tokens-details"
        )
    (said,) = answer["choices"][0]["logprobs"]["content"]
    logprobs = {one["token_id"]: one["logprob"] for one in said["top_logprobs"]}
    return NextToken(logprobs, details["cached_tokens"] or 0)
