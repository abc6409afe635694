"""The experts that vLLM chose, for router replay (`Completion.experts_SLK`). Runs where vLLM runs.

    on a GPU    vLLM returns them itself (`enable_return_routed_experts`, model runner V2); read in its source, not yet
                measured on a GPU
    on a CPU    it refuses that, so its routers tell `Recorder`

A token's keys and values lie in one slot of the paged cache for as long as anything attends to them. `Recorder` writes
the token's experts to the slot of that number, in the same forward. So a request has the experts of exactly what it
attended to: of a prefix that another one read, and of what was read anew after a preemption or a push.

Shapes: S tokens that a request read, A hidden layers of which L are MoE layers, C slots of the cache, N rows of a step,
K chosen experts. Written against vLLM 0.32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_reason.errors import ConfigError

WITHOUT = "Type rollout.engine.return_experts=false: routers are then not replayed"


def experts_of(llm: Any) -> Callable[[str, Any], np.ndarray]:
    """`f(inner, request)`: int16 (S, L, K) of a `RequestOutput` that has just finished, under vLLM's own name `inner`
    of it. To be called before the next step, which may give its slots away.

    Raises:
        ConfigError: this model's experts cannot be told.
    """
    if llm.llm_engine.vllm_config.aux_output_config.enable_return_routed_experts:
        layers = llm.collective_rpc(moe_layers)[0]
        return lambda inner, request: moe_rows(request.outputs[0].routed_experts, layers)
    recorder = Recorder(llm.collective_rpc(_runner)[0])
    return lambda inner, request: recorder.experts(inner, tokens_read(request))


def moe_layers(worker: Any) -> list[int]:
    """Which of the hidden layers are MoE layers, e.g. [1, 2, 3]."""
    return [runner.layer_id for runner in _moe_runners(worker.model_runner.get_model())]


def moe_rows(experts_SAK: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """What vLLM returns, uint8 or (above 256 experts) uint16 and 0 in dense layers, as int16 (S, L, K).

    Trap: after a push in flight, what was read before it keeps the experts of the old weights.
    """
    return experts_SAK[:, list(layers)].astype(np.int16)


def tokens_read(request: Any) -> int:
    """S: the last token was sampled and not read."""
    return len(request.prompt_token_ids) + len(request.outputs[0].token_ids) - 1


class Recorder:
    """The experts of every token in vLLM's cache.

    Args:
        runner: vLLM's model runner, in this process and with its cache allocated.

    Raises:
        ConfigError: no MoE layers, a kernel that chooses experts by itself, or a cache that drops what is attended to
            no more.
    """

    def __init__(self, runner: Any) -> None:
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        layers = _moe_runners(runner.get_model())
        if any(layer.is_monolithic for layer in layers):
            raise ConfigError(f"vLLM's kernel for experts does not tell which it chose here. {WITHOUT}")
        groups = runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
            kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
            raise ConfigError(
                f"experts are known of tokens in a cache of full attention, this one is {kinds}. {WITHOUT}"
            )
        self._runner, self._layer, self._block = runner, groups[0].layer_names[0], groups[0].kv_cache_spec.block_size
        shape = (len(layers), runner.kv_cache_config.num_blocks * self._block + 1, layers[0].router.top_k)
        self._experts_LCK = torch.full(shape, -1, dtype=torch.int16)  # the last slot is that of padding, -1
        for layer, experts_CK in zip(layers, self._experts_LCK, strict=True):
            layer.router.set_capture_fn(functools.partial(self._record, experts_CK))

    def _record(self, experts_CK: Tensor, chosen_NK: Tensor) -> None:
        from vllm.forward_context import get_forward_context

        slots = get_forward_context().slot_mapping
        if slots:  # a trial run has none
            experts_CK[slots[self._layer]] = chosen_NK.to(torch.int16)  # type: ignore[call-overload]

    def experts(self, inner: str, length: int) -> np.ndarray:
        """int16 (S, L, K) of the first `length` tokens of a request, by vLLM's own name of it."""
        blocks = torch.tensor(self._runner.requests[inner].block_ids[0])
        slots = (blocks[:, None] * self._block + torch.arange(self._block)).flatten()[:length]
        return self._experts_LCK[:, slots].transpose(0, 1).contiguous().numpy()


def _runner(worker: Any) -> Any:
    return worker.model_runner


def _moe_runners(model: Any) -> list[Any]:
    """Its MoE layers, in order."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    found = sorted((m for m in model.modules() if isinstance(m, MoERunner)), key=lambda runner: runner.layer_id)
    if not found:
        raise ConfigError(f"this model has no experts to return. {WITHOUT}")
    return found
