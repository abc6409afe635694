"""What we add to the workers of `vllm serve`: weights in, checksums out. Runs in the server's processes.

    vllm serve ... --worker-extension-cls lit_reason.rollout.vllm_extension.WorkerExtension    VLLM_SERVER_DEV_MODE=1
    POST /collective_rpc {"method": "lit_load_files", "args": ["/dev/shm/...", ["00000.safetensors", ...]]}

Arguments and answers are JSON. A failure is an answer too, {"failed": text}: vLLM's own answer would not say why.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from lit_reason.rollout.vllm_experts import moe_layers
from lit_reason.rollout.vllm_host import _held, _prepare_reload, _reload, _set_logprobs

Answer = dict[str, Any]


def _answering(method: Callable[..., Answer]) -> Callable[..., Answer]:
    @functools.wraps(method)
    def answered(*args: Any) -> Answer:
        try:
            return method(*args)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}

    return answered


class WorkerExtension:
    """Becomes a base of vLLM's worker, whose names it must not take: hence `lit_`."""

    @_answering
    def lit_facts(self) -> Answer:
        """What a client must know of the server."""
        config = cast(Any, self).vllm_config
        cache, model = config.cache_config, config.model_config
        experts = config.aux_output_config.enable_return_routed_experts
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "context": model.max_model_len,
            "block": cache.block_size if cache.enable_prefix_caching else 0,
            "moe_layers": moe_layers(self) if experts else [],
            "workers": config.parallel_config.world_size_across_dp,
            "config": {key: value for key, value in model.hf_text_config.to_dict().items() if _plain(key, value)},
        }

    @_answering
    def lit_logprobs(self, mode: str) -> Answer:
        """ "raw_logprobs" or "processed_logprobs", for all that comes; see `vllm.logprobs_mode`."""
        _set_logprobs(self, mode)
        return {}

    @_answering
    def lit_load_files(self, folder: str, files: Sequence[str]) -> Answer:
        """The weights of safetensors files, in one reload, one tensor at a time."""
        return self._lit_load(_read(Path(folder), files))

    @_answering
    def lit_join(self, address: str, port: int, rank: int, world: int) -> Answer:
        """Enters the trainer's NCCL group, which is none of torch's: servers come and go. Unmeasured on a GPU."""
        self._lit_group = communicator(address, port, rank, world, cast(Any, self).device)
        return {}

    @_answering
    def lit_load_nccl(self, tensors: Sequence[tuple[str, str, list[int]]]) -> Answer:
        """The weights (name, dtype, shape) that the trainer broadcasts in this order. Unmeasured on a GPU."""
        return self._lit_load(_received(self._lit_group, tensors, cast(Any, self).device))

    @_answering
    def lit_held(self) -> Answer:
        return {"held": {name: [one.dtype, one.shape, one.digest, one.learnt] for name, one in _held(self).items()}}

    def _lit_load(self, tensors: Iterator[tuple[str, Tensor]]) -> Answer:
        _prepare_reload(self)
        _reload(self, tensors)
        return {}


def communicator(address: str, port: int, rank: int, world: int, device: torch.device) -> Any:
    """vLLM's NCCL communicator between the trainer (rank 0) and the workers; blocks until all are there."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create(host=address, port=port, rank=rank, world_size=world)
    return PyNcclCommunicator(group, device=device)


def _plain(key: str, value: Any) -> bool:
    return isinstance(value, int | float | str | bool) and not key.startswith("_")


def _read(folder: Path, files: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, shard.get_tensor(name)


def _received(group: Any, tensors: Sequence[Sequence[Any]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for name, dtype, shape in tensors:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        group.broadcast(tensor, src=0, stream=torch.cuda.current_stream(device))
        yield name, tensor
