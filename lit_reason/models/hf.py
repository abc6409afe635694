"""Checkpoint folders of the DeepSeek-V2 / V3 family (V2-Lite, R1, Moonlight) in and out.

    FOLDER/  config.json
             model.safetensors, or model-00001-of-0000n.safetensors, ... with model.safetensors.index.json

    in    config.json -> ModelConfig -> a model without memory -> to_empty -> copy tensor after tensor into its place
    out   every tensor from its place, times its muP multiplier, shard after shard into a hidden folder -> rename

Of muP's multipliers only the residual 1/m_L acts in the forward pass (`ModelConfig.residual_scale`): embedding, head
and attention have factor 1 by parametrisation (`mup`). It is folded into the matrices that end a branch (o_proj,
down_proj) and un-folded by the `mup` block of config.json. Folding rounds unless the factor is a power of two; the lost
units in the last place are kept in `mup_rounding.bin`, which other programs ignore, so that the way back is exact.

Multi-token-prediction layers follow the trunk's and repeat embedding and head. Refused: tied embeddings, biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_reason.errors import ConfigError, DataError
from lit_reason.models.config import ModelConfig
from lit_reason.models.hf_config import CONFIG, dtype_of, fp8_block, from_hf_config, to_hf_config
from lit_reason.models.hf_files import INDEX, ROUNDING, Shards, new_folder, read_json, shard_files, some, to_json
from lit_reason.models.hf_slots import slots
from lit_reason.models.transformer import Transformer


@torch.no_grad()
def load_hf(folder: str | Path, dtype: torch.dtype | None = None) -> Transformer:
    """A checkpoint folder as our model, in training mode. Memory: the model and one tensor of the checkpoint.

    Example::

        model = load_hf("checkpoints/Moonlight-16B-A3B", dtype=torch.bfloat16)

    Args:
        dtype: of the parameters (routers stay float32); None is what config.json says (bfloat16 for FP8 weights).

    Raises:
        ConfigError: config.json describes a model that ours cannot express; says what is valid.
        DataError: a file or tensor is missing, damaged, left over, or of another shape.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    shards = Shards(folder, fp8_block(values))
    config = replace(from_hf_config(values), mtp_depth=shards.mtp_depth())
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype or dtype_of(values)).to_empty(device="cpu")
    for router in model.routers():
        router.bias_E.zero_()
        router.load_E.zero_()
    places, tensors = slots(config), model.state_dict()
    halves = values.get("rope_interleave") is False
    for name in shards.ordered([name for name, slot in places.items() if not slot.repeated]):
        _fill(places[name].view(tensors), name, shards, config, places[name].folded, halves)
    for name, slot in places.items():
        if slot.repeated and name in shards.file_of:
            _check_repeated(slot.view(tensors), name, shards)
    _check_leftovers(shards)
    return model


@torch.no_grad()
def save_hf(
    model: Transformer,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    special_tokens: Mapping[str, int | list[int] | None] | None = None,
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Writes `model` as a DeepSeek-V3 (or V2) folder for transformers and vLLM, muP folded in. Returns the folder.

    The folder appears whole or not at all. Router weights and biases are written in float32.

    Args:
        folder: must not exist, or be empty.
        max_shard_bytes: a larger model is split into shards of at most this size (a single tensor may exceed it).
        special_tokens: `{"bos_token_id": 257, "eos_token_id": 260, "pad_token_id": 256}` for config.json.
        extra: writes further files, a tokenizer's for instance, into the folder that it is given.

    Raises:
        ConfigError: the model cannot be expressed in the format, or the folder is not empty.
    """
    folder = Path(folder).absolute()
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    document = to_hf_config(model.config, str(model.embed.weight.dtype).removeprefix("torch."))
    document |= {key: (special_tokens or {}).get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    check_biases(model)
    with new_folder(folder) as temporary:
        _write_weights(model, temporary, max_shard_bytes)
        (temporary / CONFIG).write_text(to_json(document))
        if extra is not None:
            extra(temporary)
    return folder


def check_biases(model: Transformer) -> None:
    """ConfigError for selection biases that no tensor of the format would hold."""
    if model.config.scoring == "softmax" and any(router.bias_E.any() for router in model.routers()):
        raise ConfigError(
            "the routers have selection biases, which DeepSeek-V2's format (scoring=softmax) has no place for"
        )


def _interleave(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """Rotary rows from halves (pair j is rows j, j + R/2; `rope_interleave: false`) to our pairs (rows 2j, 2j + 1)."""
    rope = config.qk_rope_head_dim
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        keep, heads = config.qk_nope_head_dim, config.heads
    elif name.endswith("kv_a_proj_with_mqa.weight"):
        keep, heads = config.kv_lora_rank, 1
    else:
        return weight
    order = torch.arange(rope).view(2, -1).t().flatten() + keep
    order = torch.cat((torch.arange(keep), order))
    return weight.unflatten(0, (heads, -1))[:, order].flatten(0, 1)


def _fill(target: Tensor, name: str, shards: Shards, config: ModelConfig, folded: bool, halves: bool) -> None:
    """Copies the checkpoint's tensor into our place for it; no reference to it stays."""
    source = shards.read(name)
    if source.shape != target.shape:
        raise DataError(f"{name} has shape {tuple(source.shape)}; {CONFIG} asks for {tuple(target.shape)}")
    if folded and config.residual_scale != 1:
        source = unfold(source, config.residual_scale, shards.rounding(name))
    target.copy_(_interleave(name, source, config) if halves else source)


def _check_repeated(target: Tensor, name: str, shards: Shards) -> None:
    source = shards.read(name)
    if source.shape != target.shape or not torch.equal(source.to(target.dtype), target):
        raise DataError(
            f"{shards.folder}: {name} differs from the trunk's own; a multi-token-prediction layer with an embedding "
            "or a head of its own cannot be expressed"
        )


def _check_leftovers(shards: Shards) -> None:
    """Every tensor must have been read, but for stored rotary tables."""
    left = [name for name in shards.file_of if name not in shards.used and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise DataError(f"{shards.folder} holds {len(left)} tensors that our model has no place for: {some(left)}")


def folded(weight: Tensor, scale: float) -> Tensor:
    """weight * scale, rounded once, to weight's dtype."""
    return (weight.double() * scale).to(weight.dtype)


def fold(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`folded`, and what makes `unfold` exact: units in the last place, an integer
    tensor (all 0 for a power of two, but for underflow)."""
    product = folded(weight, scale)
    rounding = _bits(weight) - _bits(unfold(product, scale))
    return product, rounding if rounding.abs().max() > 127 else rounding.to(torch.int8)


def unfold(folded: Tensor, scale: float, rounding: Tensor | None = None) -> Tensor:
    """The weight that `fold` had; without `rounding` within one unit in the last place."""
    weight = (folded.double() / scale).to(folded.dtype)
    if rounding is None:
        return weight
    if rounding.shape != weight.shape or rounding.is_floating_point():
        raise DataError(f"{ROUNDING} does not fit its weights; delete it to load them without")
    return (_bits(weight) + rounding.to(_bits(weight).dtype)).view(weight.dtype)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _write_weights(model: Transformer, folder: Path, max_shard_bytes: int) -> None:
    """The shards, their index when there are several, and `ROUNDING` when folding lost something."""
    tensors, places, scale = model.state_dict(), slots(model.config), model.config.residual_scale
    sizes = {name: _nbytes(slot.view(tensors)) for name, slot in places.items()}
    plan = shard_files(sizes, max_shard_bytes)
    file_of, rounding = {}, {}
    for file, names in plan.items():
        shard = {}
        for name in names:
            shard[name] = places[name].view(tensors).detach().cpu().clone(memory_format=torch.contiguous_format)
            if places[name].folded and scale != 1:
                shard[name], lost = fold(shard[name], scale)
                if lost.any():
                    rounding[name] = lost
        save_file(shard, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(plan) > 1:
        document = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (folder / INDEX).write_text(to_json(document))
    if rounding:
        save_file(rounding, folder / ROUNDING)


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
