"""vLLM's host and engine with a fault that can be switched on: everything else is the real thing.

engine.inject("no flush")     from the next call on, in the trainer and in the engine's process
engine.inject("")             healthy again
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_reason.models.adapters import adapters_off
from lit_reason.models.export import KEPT
from lit_reason.rollout.engine import Progress
from lit_reason.rollout.sampling import Sampling
from lit_reason.rollout.vllm import VLLMEngine
from lit_reason.rollout.vllm_host import VLLMHost
from lit_reason.rollout.worker import Generated, Request

Tensors = Iterator[tuple[str, Tensor]]
AT_START = "LIT_REASON_FAULT"  # a fault that a new process has from its start


class FaultyEngine(VLLMEngine):
    """Faults of the trainer's side."""

    HOST = "faults.hosts:FaultyHost"
    fault, fault_at_start = "", ""

    def inject(self, fault: str) -> None:
        self.fault = fault
        self.process.call("inject", fault, silence_s=self.deadlines.push)

    def environment(self) -> dict[str, str]:
        return super().environment() | {AT_START: self.fault_at_start}

    def push(self, model: nn.Module, version: int) -> None:
        if self.fault == "skipped push":
            self._version = version
            self._versions.append(version)
            return
        super().push(model, version)

    def export(self, model: nn.Module) -> Tensors:
        if self.fault == "adapters not delivered":
            with adapters_off(model):
                yield from super().export(model)
        elif self.fault == "router bias in bfloat16":
            for name, tensor in super().export(model):
                yield name, tensor.bfloat16().float() if name.endswith(KEPT) else tensor
        else:
            yield from super().export(model)


class FaultyHost(VLLMHost):
    """Faults of the engine's side."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault = os.environ.get(AT_START, "")
        self.old: dict[str, Tensor] = {}

    def inject(self, fault: str) -> None:
        self.fault = fault

    def remember(self) -> None:
        self.old = self.llm.collective_rpc(_copies)[0]

    def load(self, tensors: Tensors, version: int) -> None:
        if self.fault == "refused transfer":
            raise RuntimeError("this engine takes no weights")
        before = {name: list(versions) for name, versions in self._running.items()}
        super().load(ON_THE_WAY.get(self.fault, iter)(tensors), version)
        if self.fault == "hidden race":
            for name, versions in before.items():
                self._running[name][:] = versions

    def flush(self) -> None:
        if self.fault != "no flush":
            super().flush()

    def sleep(self, level: int) -> None:
        """vLLM's CPU build only warns; here level 2 drops the weights as on a GPU."""
        if level == 2 or self.fault == "sleep 1 drops":
            self.llm.collective_rpc(_drop)
        super().flush()

    def wake(self, tags: list[str] | None = None) -> None:
        if self.fault == "stale after sleep":
            self.llm.collective_rpc(_restore, args=(self.old,))

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, alive: Callable[[Progress], None]
    ) -> list[Generated]:
        def watched(progress: Progress) -> None:
            if self.fault == "killed for memory":
                os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does
            if self.fault == "out of memory":
                exhaust()
            alive(progress)

        return super().generate(requests, sampling, watched)


def exhaust(allowed: int = 256 << 20) -> None:
    """Allocates until the kernel refuses: `allowed` bytes beyond what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + allowed, hard))
    try:
        taken = []
        while True:
            taken.append(bytearray(16 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _without_bias(tensors: Tensors) -> Tensors:
    return ((name, tensor) for name, tensor in tensors if not name.endswith(KEPT))


def _swapped(tensors: Tensors) -> Tensors:
    for name, tensor in tensors:
        if ".experts.0." in name:
            other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            name = ".".join(other.get(part, part) for part in name.split("."))
        yield name, tensor


def _without_expert(tensors: Tensors) -> Tensors:
    return ((name, tensor) for name, tensor in tensors if ".experts.1." not in name)


ON_THE_WAY: dict[str, Callable[[Tensors], Tensors]] = {
    "no router bias": _without_bias,
    "swapped gate/up": _swapped,
    "one expert missing": _without_expert,
}


@torch.no_grad()
def _drop(worker: Any) -> None:
    for tensor in _all(worker).values():
        tensor.zero_()


def _copies(worker: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in _all(worker).items()}


@torch.no_grad()
def _restore(worker: Any, old: dict[str, Tensor]) -> None:
    for name, tensor in _all(worker).items():
        tensor.copy_(old[name])


def _all(worker: Any) -> dict[str, Tensor]:
    """What can be written to: packed products of the CPU build are opaque."""
    model = worker.model_runner.get_model()
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
