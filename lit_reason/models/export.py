"""A model's weights one at a time in the names and shapes of a checkpoint: what an engine is pushed.

    ours      slots: one tensor per expert and per half of gate | up, adapters and muP's multiplier folded in
    theirs    transformers' own way back from its stacked experts

At no time is more than one layer held twice. Routers' biases and other buffers keep their dtype: a selection bias in
bfloat16 cannot take steps of 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError
from lit_reason.models.adapters import merged_weights
from lit_reason.models.hf import check_biases, folded
from lit_reason.models.hf_config import CONFIG, to_hf_config
from lit_reason.models.hf_policy import HFModel
from lit_reason.models.hf_slots import slots
from lit_reason.models.transformer import Transformer

KEPT = "e_score_correction_bias"  # stays float32


@torch.no_grad()
def checkpoint_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the checkpoint that `save_hf` or transformers would write, in `dtype`, layer after layer.

    Multi-token-prediction layers are left out: engines do not draft with them.

    Raises:
        ConfigError: a model that no checkpoint format is known for, or that its format cannot hold.
    """
    if isinstance(model, Transformer):
        yield from _ours(model, dtype)
    elif isinstance(model, HFModel):
        yield from _theirs(model, dtype)
    else:
        raise ConfigError(
            f"a {type(model).__name__} has no checkpoint format: push a lit_reason.models.Transformer or HFModel"
        )


def checkpoint_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of that checkpoint."""
    if isinstance(model, Transformer):
        document = to_hf_config(model.config, str(dtype).removeprefix("torch.")) | {"num_nextn_predict_layers": 0}
    elif isinstance(model, HFModel):
        document = json.loads(model.lm.config.to_json_string(use_diff=False))
        document["architectures"] = [type(model.lm).__name__]  # transformers sets it when it saves
        document |= {"torch_dtype": str(dtype).removeprefix("torch."), "dtype": str(dtype).removeprefix("torch.")}
    else:
        raise ConfigError(f"a {type(model).__name__} has no {CONFIG}")
    return document


def _ours(model: Transformer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    check_biases(model)
    weights, scale = merged_weights(model), model.config.residual_scale
    for name, slot in slots(model.config).items():
        if slot.name.startswith("mtp.") or slot.repeated:
            continue
        tensor = slot.view(weights).detach()
        if slot.folded and scale != 1:
            tensor = folded(tensor, scale)
        yield name, tensor if name.endswith(KEPT) else tensor.to(dtype)


def _theirs(model: HFModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from transformers.core_model_loading import revert_weight_conversion

    weights = merged_weights(model.lm)
    tied = set(getattr(model.lm, "all_tied_weights_keys", {}) or {})
    kept = [name for name in model.lm.state_dict() if name not in tied and name in weights]
    by_layer: dict[str, list[str]] = {}
    for name in kept:
        by_layer.setdefault(_layer(name), []).append(name)
    for names in by_layer.values():
        for name, tensor in revert_weight_conversion(model.lm, {n: weights[n].detach() for n in names}).items():
            yield name, tensor if name.endswith(KEPT) or not tensor.is_floating_point() else tensor.to(dtype)


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.gate.weight`: up to the first number, else the whole name."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
