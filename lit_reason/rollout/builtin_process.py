"""The builtin engine in a process of its own, so that it can generate while the trainer trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import ConfigError
from lit_reason.models import ModelConfig, Transformer
from lit_reason.rollout.builtin import BuiltinEngine
from lit_reason.rollout.engine import Held, NextToken, Progress
from lit_reason.rollout.hosted import HostedEngine
from lit_reason.rollout.sampling import Sampling
from lit_reason.rollout.worker import Generated, Request
from lit_reason.types import Prompt


class BuiltinProcess(HostedEngine):
    """`BuiltinEngine` behind the same protocol, in a process of its own, always with weights of its own.

    Example::

        engine = BuiltinProcess(tokenizer, cores=[1])
        lit-reason-train ... rollout=builtin_process rollout.shape.staleness=1 rollout.engine.cores=[1]

    Args:
        threads: of its process.
        settings: further ones of `BuiltinEngine`, e.g. `{max_rows: 256, return_experts: true}`.

    Raises:
        ConfigError: at the first push, for a model of transformers.
    """

    HOST = "lit_reason.rollout.builtin_process:BuiltinHost"
    in_flight = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: str = "bfloat16",
        threads: int = 1,
        settings: Mapping[str, Any] | None = None,
        cores: Sequence[int] | None = None,
        deadlines: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(tokenizer, dtype, cores, deadlines)
        self._engine = BuiltinEngine(tokenizer, dtype, **(settings or {}))  # refuses wrong settings here
        self.threads, self._settings = threads, dict(settings or {})

    def prefix_block(self) -> int:
        return 0

    def truth(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return self._engine.truth(model)

    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}

    def settings(self, model: nn.Module) -> dict[str, Any]:
        if not isinstance(model, Transformer):
            raise ConfigError(
                f"rollout=builtin_process runs our own models, got a {type(model).__name__}. Type rollout=builtin or "
                "rollout=vllm"
            )
        if next(model.parameters()).device.type != "cpu":
            raise ConfigError(
                "rollout=builtin_process generates on CPU cores beside a trainer on a CPU; this one trains on a GPU. "
                "Type rollout=builtin or rollout=vllm"
            )
        dtype = str(self.dtype).removeprefix("torch.")
        return {"config": model.config, "tokenizer": self.tokenizer, "dtype": dtype, "settings": self._settings}


class BuiltinHost:
    """The engine in the child; its model is the copy that the pushes fill."""

    in_flight = False

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, dtype: str, settings: Mapping[str, Any]) -> None:
        self.engine = BuiltinEngine(tokenizer, dtype, **settings)
        with torch.device("meta"):
            model = Transformer(config)
        self.model = model.to(self.engine.dtype).to_empty(device="cpu").requires_grad_(False).eval()

    @torch.no_grad()
    def load(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        places = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in tensors:
            places[name].copy_(tensor)
        self.engine.push(self.model, version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, alive: Callable[[Progress], None]
    ) -> list[Generated]:
        prompts = [Prompt(str(i), "", "", "", request.token_ids) for i, request in enumerate(requests)]
        seeds, limits = [request.seed for request in requests], [request.limit for request in requests]
        found = self.engine.generate(prompts, sampling, seeds, progress=alive, limits=limits)
        return [
            Generated(
                one.token_ids,
                one.logprobs,
                one.finish_reason == "stop",
                one.version,
                experts_SLK=None if one.experts_SLK is None else one.experts_SLK.numpy(),
            )
            for one in found
        ]

    def held(self) -> Mapping[str, Held]:
        return self.engine.held()

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        return self.engine.next_token(prompts, top)
