"""What a model inside vLLM holds, back in the names and shapes of a checkpoint. Runs where vLLM runs.

    merged products      gate_up_proj, qkv_proj, fused_qkv_a_proj: cut into their parts
    stacked experts      w13, w2: one tensor per expert and half; vLLM's CPU layout is undone
    absorbed attention   W_UK_T and W_UV, which decoding reads, put together to kv_b_proj again
    packed products      vLLM on a CPU keeps no weight but an opaque handle: the layer is asked for unit vectors,
                         whose images are its columns but for zeros' signs
    padded vocabulary    cut

So a checksum is taken of the numbers that generate, not of what was sent. Written against vLLM 0.32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_reason.errors import WeightSyncError
from lit_reason.rollout.engine import Held, held_as_is


@torch.no_grad()
def held(model: Any) -> dict[str, Held]:
    """Every parameter and buffer of vLLM's `model`, by the checkpoint's names; see `lit_reason.rollout.Provable`."""
    return held_as_is(_tensors(model))


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    module: Any
    for prefix, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            yield from _head(model, prefix, module)
        elif isinstance(module, VocabParallelEmbedding):
            yield f"{prefix}.weight", module.get_parameter("weight")[: module.org_vocab_size]
        elif isinstance(module, LinearBase):
            yield from _linear(model, prefix, module)
        elif isinstance(module, RoutedExperts):
            yield from _experts(prefix, module)
        elif hasattr(module, "W_UK_T") and hasattr(module, "W_UV"):
            yield _absorbed(prefix, module)
            yield from _own(prefix, module, but=("W_UK_T", "W_UV"))
        else:
            yield from _own(prefix, module)


def _own(prefix: str, module: nn.Module, but: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in but:
            yield f"{prefix}.{name}" if prefix else name, tensor


def _head(model: Any, prefix: str, head: Any) -> Iterator[tuple[str, Tensor]]:
    """A tied one is the embedding; on a CPU a packed copy of either is what makes the logits."""
    tied, rows = model.config.tie_word_embeddings, head.org_vocab_size
    name = "model.embed_tokens.weight" if tied else f"{prefix}.weight"
    yield f"{name} head" if tied else name, head.weight[:rows]
    if hasattr(head, "cpu_linear"):
        units = torch.eye(head.embedding_dim, dtype=head.weight.dtype, device=head.weight.device)
        yield f"{name} packed", head.quant_method.apply(head, units).t()[:rows]


def _linear(model: Any, prefix: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
    weight = layer.weight
    if weight.numel() == 0:
        units = torch.eye(
            getattr(layer, "input_size_per_partition", layer.input_size), dtype=weight.dtype, device=weight.device
        )
        weight = layer.quant_method.apply(layer, units).t()
    parent, _, name = prefix.rpartition(".")
    parts = model.packed_modules_mapping.get(name)
    if parts is None:
        yield f"{prefix}.weight", weight
    else:
        for part, rows in zip(parts, weight.split(layer.output_partition_sizes), strict=True):
            yield f"{parent}.{part}.weight", rows
    yield from _own(prefix, layer, but=("weight",))


def _experts(prefix: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
    """DeepSeek's and Qwen's names: experts.N.{gate,up,down}_proj."""
    stem = prefix.removesuffix(".routed_experts")
    F, experts = layer.moe_config.intermediate_size_per_partition, layer.quant_method.moe_kernel.fused_experts
    isa = None if getattr(experts, "_use_zentorch", False) else getattr(experts, "isa", None)
    unpack = _unchanged if isa is None else functools.partial(_unpack, isa=isa)
    for e in range(layer.w13_weight.shape[0]):
        gate_up, down = unpack(layer.w13_weight[e]), unpack(layer.w2_weight[e])
        padded = gate_up.shape[0] // 2
        yield f"{stem}.{e}.gate_proj.weight", gate_up[:F]
        yield f"{stem}.{e}.up_proj.weight", gate_up[padded : padded + F]
        yield f"{stem}.{e}.down_proj.weight", down[:, :F]
    for name, tensor in _own(prefix, layer, but=("w13_weight", "w2_weight")):
        if name.endswith(".e_score_correction_bias"):  # the router's, which the kernel reads from here
            name = f"{stem.rpartition('.')[0]}.gate.e_score_correction_bias used"
        yield name, tensor


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def _unpack(packed: Tensor, isa: str) -> Tensor:
    """The matrix that vLLM's CPU kernel laid out for its instructions."""
    order = _packing(tuple(packed.shape), packed.dtype, isa)
    flat = torch.empty_like(packed).flatten()
    flat[order] = packed.flatten()
    return flat.view(packed.shape)


@functools.cache
def _packing(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> Tensor:
    """order[i]: where the i-th element of the packed matrix stood. Found by packing every element's own number, a byte
    at a time, since bfloat16 counts to 256 only."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    number = torch.arange(shape[0] * shape[1])
    order = torch.zeros_like(number)
    for byte in range((number.numel().bit_length() + 7) // 8):
        part = ((number >> 8 * byte) & 255).to(dtype).view(1, *shape)
        order += cpu_prepack_moe_weight(part, isa).flatten().long() << 8 * byte
    if not torch.equal(order.sort().values, number):
        raise WeightSyncError(f"vLLM's layout of experts for {isa!r} is no reordering: their checksums cannot be taken")
    return order


def _absorbed(prefix: str, attention: Any) -> tuple[str, Tensor]:
    keys_HNC, values_HCV = attention.W_UK_T, attention.W_UV
    both = torch.cat((keys_HNC, values_HCV.transpose(1, 2)), dim=1).flatten(0, 1)
    return f"{prefix.partition('.mla_attn')[0]}.kv_b_proj.weight absorbed", both
