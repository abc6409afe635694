"""Layers that keep only their inputs for the backward pass, and compute the rest again there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lit_kernels.swap import Swap
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lit_reason.callbacks.swapping import (
    Change,
    Swapping,
    chosen_layers,
    no_layers,
    patterns,
    swapped,
    without_cache,
)
from lit_reason.errors import ConfigError

SMALL = 2**16  # bytes: below, a copy to the host costs more than the memory is worth


class Checkpointed(Swap):
    """Put on a layer; see `ActivationCheckpointing`."""

    claim = "what it keeps for the backward pass"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        offload: bool = self.swap_settings[Checkpointed]["offload"]  # type: ignore[attr-defined]

        with _offloading() if offload else nullcontext():
            return checkpoint(self.layer_forward, *args, use_reentrant=False, **without_cache(kwargs))

    def layer_forward(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        with _buffers_kept(self) if _in_backward() else nullcontext():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@torch.compiler.assume_constant_result
def _in_backward() -> bool:
    """Whether autograd runs this, to compute again; never while a graph is traced, which knows how to recompute."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Counters and running statistics have moved in the first pass already; the second must not move them again."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


class _OnHost(NamedTuple):
    copy: Tensor
    ready: torch.cuda.Event
    device: torch.device


def _offloading() -> saved_tensors_hooks:
    """What is saved under it waits in pinned host memory; the copies out run on a stream of their own."""
    return saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: Tensor) -> Tensor | _OnHost:
    if not tensor.is_cuda or tensor.nbytes < SMALL or isinstance(tensor, nn.Parameter):
        return tensor
    stream = _side_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory may be used again only after the copy
        return _OnHost(host, stream.record_event(), tensor.device)  # type: ignore[arg-type]


def _to_device(saved: Tensor | _OnHost) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    torch.cuda.current_stream(saved.device).wait_event(saved.ready)
    return saved.copy.to(saved.device, non_blocking=True)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


class ActivationCheckpointing(Swapping):
    """Recomputes each layer's activations in the backward pass (1604.06174): memory for about a third more compute.
    Buffers that a layer's forward moves (expert loads, running statistics) move once.

    Args:
        layers: shell patterns of module names; empty: the repeated layers, i.e. the children of the model's outermost
            lists of modules of one class.
        every: checkpoint every n-th of them; 1 is all.
        offload: keep the layers' inputs in pinned host memory until the backward pass needs them (CUDA only).

    Example::

        Trainer(callbacks=[ActivationCheckpointing()])

    YAML::

        activation_checkpointing:
          _target_: lit_reason.callbacks.ActivationCheckpointing
    """

    def __init__(self, layers: Sequence[str] = (), every: int = 1, offload: bool = False) -> None:
        if not isinstance(every, int) or every < 1:
            raise ConfigError(f"ActivationCheckpointing got every={every!r}; valid: a whole number of 1 or more")
        self.layers = patterns(type(self).__name__, "layers", layers)
        self.every, self.offload = every, offload

    def try_on(self, device: torch.device) -> None:
        if self.offload and device.type != "cuda":
            raise ConfigError(
                f"ActivationCheckpointing got offload=True on a {device.type}: there is no other memory to offload to. "
                "Type offload=False"
            )

    def changes(self, model: nn.Module) -> Iterator[Change]:
        for i, (name, module) in enumerate(chosen_layers(model, self.layers)):
            if i % self.every:
                yield Change(name, module, f"every={self.every} leaves it out")
            else:
                what = "recomputed in the backward pass" + (", inputs on the host" if self.offload else "")
                yield swapped(name, module, what, Checkpointed, offload=self.offload)

    def missing(self) -> str:
        return no_layers(type(self).__name__, self.layers)
