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

import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_reason.errors import ConfigError, DataError, nearest
from lit_reason.models.config import Base, ModelConfig, Yarn
from lit_reason.models.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ROUNDING = "mup_rounding.bin"  # safetensors; no engine takes it for weights under this name
LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm in transformers, whatever rms_norm_eps says
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` fixes."""

    model_type: str
    architecture: str
    scoring: str
    group_score: str
    topk_methods: tuple[str, ...]  # the first is the default


V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", "sigmoid", "top2", ("noaux_tc",))
V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", "softmax", "max", ("greedy", "group_limited_greedy"))
FAMILIES = {family.model_type: family for family in (V3, V2)}


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
    values = _read_json(folder / CONFIG)
    shards = _Shards(folder, _block(values))
    config = replace(from_hf_config(values), mtp_depth=shards.mtp_depth())
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype or _dtype(values)).to_empty(device="cpu")
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
) -> Path:
    """Writes `model` as a DeepSeek-V3 (or V2) folder for transformers and vLLM, muP folded in. Returns the folder.

    The folder appears whole or not at all. Router weights and biases are written in float32.

    Args:
        folder: must not exist, or be empty.
        max_shard_bytes: a larger model is split into shards of at most this size (a single tensor may exceed it).
        special_tokens: `{"bos_token_id": 257, "eos_token_id": 260, "pad_token_id": 256}` for config.json.

    Raises:
        ConfigError: the model cannot be expressed in the format, or the folder is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; give the name of a new folder")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
    document = to_hf_config(model.config, str(model.embed.weight.dtype).removeprefix("torch."))
    document |= {key: (special_tokens or {}).get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if model.config.scoring == "softmax" and any(router.bias_E.any() for router in model.routers()):
        raise ConfigError(
            "the routers have selection biases, which DeepSeek-V2's format (scoring=softmax) has no place for"
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_weights(model, temporary, max_shard_bytes)
        (temporary / CONFIG).write_text(_to_json(document))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# --- config.json -----------------------------------------------------------------------------------------------------

_SAME = {  # config.json's key: ours
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "ffn_width",
    "first_k_dense_replace": "first_dense",
    "max_position_embeddings": "max_seq_len",
}
_SAME_MOE = {
    "n_routed_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_width",
}
_FIXED = {  # key: the only value that our model expresses, which is also what a missing key means
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
}


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """config.json -> our shape. Without a `mup` block the checkpoint is its own muP base: every multiplier is 1.

    Raises:
        ConfigError: with the key, the value that was got and the valid ones.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise ConfigError(
            f"model_type={values.get('model_type')!r}: {nearest(str(values.get('model_type')), FAMILIES)}"
        )
    for key, valid in _FIXED.items():
        _refuse_unless(values, key, (None, valid))
    _refuse_unless(values, "rope_interleave", (None, True, False) if family is V3 else (None, True))
    if "q_lora_rank" not in values:
        raise ConfigError(f"{CONFIG} lacks 'q_lora_rank'; null means queries straight from the width")
    same = {ours: _number(values, key, int) for key, ours in _SAME.items()}
    _refuse_unless(values, "num_key_value_heads", (None, same["heads"]))
    if values.get("n_routed_experts") is None:  # V2's way to say "dense"
        same["first_dense"] = same["depth"]
    same["first_dense"] = min(same["first_dense"], same["depth"])
    eps = _number(values, "rms_norm_eps", float)
    theta, yarn = _rope(values)
    config = ModelConfig(
        **same,
        **(_routing(values, family) if same["first_dense"] < same["depth"] else {}),
        q_lora_rank=_number(values, "q_lora_rank", int, None),
        rope_theta=theta,
        yarn=yarn,
        norm_eps=eps,
        latent_norm_eps=None if eps == LATENT_EPS else LATENT_EPS,
        base=Base(width=same["width"], depth=same["depth"]),
    )
    return config if values.get("mup") is None else _with_mup(config, values["mup"])


def _routing(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    method = values.get("topk_method") or family.topk_methods[0]
    _refuse_unless(values, "topk_method", (None, *family.topk_methods))
    _refuse_unless(values, "scoring_func", (None, family.scoring))
    if family is V2:
        _refuse_unless(
            values, "norm_topk_prob", (None, False), "programs disagree on what it means for V2's routed_scaling_factor"
        )
    groups = 1 if method == "greedy" else _number(values, "n_group", int, 1)
    return {
        **{ours: _number(values, key, int) for key, ours in _SAME_MOE.items()},
        "shared_experts": _number(values, "n_shared_experts", int, 0),
        "expert_groups": groups,
        "groups_per_token": 1 if groups == 1 else _number(values, "topk_group", int),
        "scoring": family.scoring,
        "group_score": family.group_score if groups > 1 else "top2",
        "norm_topk_prob": family is V3 and values.get("norm_topk_prob") is not False,
        "routed_scale": _number(values, "routed_scaling_factor", float),
        "balance_loss": _number(values, "aux_loss_alpha", float, ModelConfig.balance_loss),
    }


def _rope(values: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """(rope_theta, yarn) from `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling={rope!r}: expected an object or null")
    theta = _number({"rope_theta": values.get("rope_theta"), **rope}, "rope_theta", float, 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    _refuse_unless({"rope_type": kind}, "rope_type", ("default", "yarn"))
    for key, valid in {"partial_rotary_factor": 1.0, "truncate": True, "attention_factor": None}.items():
        _refuse_unless(rope, key, (None, valid))
    if kind == "default":
        return theta, None
    mscale, all_dim = (_number(rope, key, float, 0.0) for key in ("mscale", "mscale_all_dim"))
    if not all_dim and mscale in (0.0, 1.0):  # what programs do without the two: m(1) on cos and sin
        mscale = 1.0
    _check_mscales(mscale, all_dim)
    return theta, Yarn(
        factor=_number(rope, "factor", float),
        original_max_seq_len=_number(rope, "original_max_position_embeddings", int),
        beta_fast=_number(rope, "beta_fast", float, 32.0),
        beta_slow=_number(rope, "beta_slow", float, 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )


def _check_mscales(mscale: float, all_dim: float) -> None:
    if not (mscale and all_dim) and (mscale, all_dim) != (1.0, 0.0):
        raise ConfigError(
            f"YaRN with mscale={mscale}, mscale_all_dim={all_dim}: programs disagree on what that means; valid: both "
            "given and not 0, or mscale=1 with mscale_all_dim=0"
        )


def _with_mup(config: ModelConfig, mup: Any) -> ModelConfig:
    """`config` with the parametrisation of its `mup` block."""
    names = ("base", "init_gain", "embed_std", "residual_scale")
    if not isinstance(mup, Mapping) or any(name not in mup for name in names):
        raise ConfigError(f"mup={mup!r}: expected an object with {', '.join(names)}")
    base = mup["base"]
    if not isinstance(base, Mapping):
        raise ConfigError(f"mup.base={base!r}: expected an object")
    for key in base:
        if base[key] is not None:
            _number(base, key, int)
    gain, std = (_number(mup, key, float) for key in ("init_gain", "embed_std"))
    config = ModelConfig.from_dict({**config.to_dict(), "base": base, "init_gain": gain, "embed_std": std})
    if mup["residual_scale"] != config.residual_scale:
        raise ConfigError(
            f"mup.residual_scale={mup['residual_scale']!r} was folded into the weights, but base.depth / "
            f"num_hidden_layers is {config.residual_scale}; restore the config.json that was exported"
        )
    return config


def to_hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Our shape as config.json.

    Args:
        dtype: of the weights, "float32" or "bfloat16".

    Raises:
        ConfigError: for what transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM cannot express.
    """
    family = _family_of(config)
    if config.latent_eps != LATENT_EPS:
        raise ConfigError(
            f"the latents' RMSNorm has eps {config.latent_eps} (model.latent_norm_eps); transformers has {LATENT_EPS}"
        )
    document = {key: getattr(config, ours) for key, ours in (_SAME | _SAME_MOE).items()}
    document |= _FIXED | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "num_key_value_heads": config.heads,
        "q_lora_rank": config.q_lora_rank,
        "n_shared_experts": config.shared_experts,
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "topk_method": family.topk_methods[family is V2 and config.expert_groups > 1],
        "scoring_func": family.scoring,
        "norm_topk_prob": config.norm_topk_prob if config.moe_layers else family is V3,
        "routed_scaling_factor": config.routed_scale,
        "moe_router_dtype": "float32",
        "aux_loss_alpha": config.balance_loss,
        "seq_aux": True,
        "rms_norm_eps": config.norm_eps,
        "rope_interleave": True,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.yarn is None else _rope_scaling(config.yarn),
        "num_nextn_predict_layers": config.mtp_depth,
        "use_cache": True,
    }
    document["mup"] = {
        "residual_scale": config.residual_scale,
        "base": asdict(config.base),
        "init_gain": config.init_gain,
        "embed_std": config.embed_std,
    }
    return document


def _rope_scaling(yarn: Yarn) -> dict[str, Any]:
    _check_mscales(yarn.mscale, yarn.mscale_all_dim)
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_seq_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _family_of(config: ModelConfig) -> Family:
    """The family whose class computes what `config` says."""
    if not config.moe_layers:
        return V3
    family = V3 if config.scoring == "sigmoid" else V2
    got = f"model.scoring={config.scoring}"
    if config.expert_groups > 1 and config.group_score != family.group_score:
        raise ConfigError(f"{got} with model.group_score={config.group_score}: exported is {family.group_score} only")
    if family is V2 and config.norm_topk_prob:
        raise ConfigError(f"{got} with model.norm_topk_prob=true: DeepSeek-V2's weights are not normalised")
    if family is V2 and config.width % config.heads:
        raise ConfigError(f"model.width={config.width}: DeepSeek-V2 wants a multiple of model.heads={config.heads}")
    if family is V3 and config.experts < 2:
        raise ConfigError(f"model.experts={config.experts}: DeepSeek-V3 wants at least 2")
    return family


_REQUIRED = object()


def _number(values: Mapping[str, Any], key: str, kind: type[int] | type[float], default: Any = _REQUIRED) -> Any:
    """`values[key]`, checked; a missing or null one is `default`, if there is one."""
    if values.get(key) is None and default is not _REQUIRED:
        return default
    if key not in values:
        raise ConfigError(f"{CONFIG} lacks {key!r}; copy the checkpoint's own, whole")
    value: Any = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}: must be {'an integer' if kind is int else 'a number'}")
    return kind(value)


def _refuse_unless(values: Mapping[str, Any], key: str, valid: tuple[Any, ...], reason: str = "") -> None:
    if values.get(key) not in valid:
        choices = ", ".join(repr(v) for v in valid if v is not None)
        raise ConfigError(
            f"{key}={values[key]!r} in {CONFIG} cannot be expressed{f' ({reason})' if reason else ''}; valid: {choices}"
        )


def _dtype(values: Mapping[str, Any]) -> torch.dtype:
    if values.get("quantization_config"):
        return torch.bfloat16
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise ConfigError(f"dtype={name!r}: {nearest(str(name), _DTYPES)}")
    return _DTYPES[name]


def _block(values: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale of an FP8 checkpoint."""
    quantization = values.get("quantization_config") or {}
    _refuse_unless(quantization, "quant_method", (None, "fp8"))
    block = quantization.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ConfigError(f"quantization_config.weight_block_size={block!r}: must be two integers such as [128, 128]")
    return block[0], block[1]


# --- where each tensor lives -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """A checkpoint tensor's place in ours: rows `start:stop` of `name`, or of its expert `expert`.

    `folded`: the checkpoint holds it times the residual multiplier. `repeated`: another tensor has this place too, and
    this one must equal it, if it is there at all.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    expert: int | None = None
    folded: bool = False
    repeated: bool = False

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        tensor = tensors[self.name]
        return (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Their name -> our place, for every parameter and every router's bias."""
    out = {
        "model.embed_tokens.weight": Slot("embed.weight"),
        "model.norm.weight": Slot("norm.weight"),
        "lm_head.weight": Slot("head.weight"),
    }
    attention, dense = _attention_slots(config), _swiglu_slots("mlp.", "ffn.", config.ffn_width)
    moe = _moe_slots(config)
    for i in range(config.depth):
        for name, slot in (attention | (dense if i < config.first_dense else moe)).items():
            out[f"model.layers.{i}.{name}"] = replace(slot, name=f"blocks.{i}.{slot.name}")
    for k in range(config.mtp_depth):  # numbered on after the trunk; they repeat the embedding and the head
        layer = f"model.layers.{config.depth + k}."
        for name, slot in (attention | (moe if config.moe_layers else dense)).items():
            out[layer + name] = replace(slot, name=f"mtp.{k}.block.{slot.name}", folded=False)
        for theirs, ours in {
            "enorm": "enorm",
            "hnorm": "hnorm",
            "eh_proj": "eh_proj",
            "shared_head.norm": "norm",
        }.items():
            out[f"{layer}{theirs}.weight"] = Slot(f"mtp.{k}.{ours}.weight")
        out[f"{layer}embed_tokens.weight"] = Slot("embed.weight", repeated=True)
        out[f"{layer}shared_head.head.weight"] = Slot("head.weight", repeated=True)
    return out


def _attention_slots(config: ModelConfig) -> dict[str, Slot]:
    query = (
        {"q_proj": "q"}
        if config.q_lora_rank is None
        else {"q_a_proj": "q.0", "q_a_layernorm": "q.1", "q_b_proj": "q.2"}
    )
    names = query | {"kv_a_proj_with_mqa": "kv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_b"}
    return {
        "input_layernorm.weight": Slot("attn_norm.weight"),
        "post_attention_layernorm.weight": Slot("ffn_norm.weight"),
        "self_attn.o_proj.weight": Slot("attn.out.weight", folded=True),
        **{f"self_attn.{theirs}.weight": Slot(f"attn.{ours}.weight") for theirs, ours in names.items()},
    }


def _swiglu_slots(
    theirs: str, ours: str, hidden: int, expert: int | None = None, suffix: str = ".weight"
) -> dict[str, Slot]:
    return {
        f"{theirs}gate_proj.weight": Slot(f"{ours}gate_up{suffix}", stop=hidden, expert=expert),
        f"{theirs}up_proj.weight": Slot(f"{ours}gate_up{suffix}", start=hidden, expert=expert),
        f"{theirs}down_proj.weight": Slot(f"{ours}down{suffix}", expert=expert, folded=True),
    }


def _moe_slots(config: ModelConfig) -> dict[str, Slot]:
    out = {"mlp.gate.weight": Slot("ffn.router.weight")}
    if config.scoring == "sigmoid":
        out["mlp.gate.e_score_correction_bias"] = Slot("ffn.router.bias_E")
    for e in range(config.experts):
        out |= _swiglu_slots(f"mlp.experts.{e}.", "ffn.experts.", config.expert_width, e, suffix="")
    if config.shared_experts:
        hidden = config.shared_experts * config.expert_width
        out |= _swiglu_slots("mlp.shared_experts.", "ffn.shared.", hidden)
    return out


# --- weights in ------------------------------------------------------------------------------------------------------


class _Shards:
    """The tensors of a folder, read one at a time; FP8 ones dequantised. `used` are the names that were asked for."""

    def __init__(self, folder: Path, block: tuple[int, int]) -> None:
        self.folder, self.block = folder, block
        self.file_of = _file_of(folder)
        self.used: set[str] = set()
        # Few, so that what was read can leave memory: a weight's, its scale's and the rounding.
        self._open = functools.lru_cache(maxsize=3)(functools.partial(safe_open, framework="pt"))

    def mtp_depth(self) -> int:
        """How many multi-token-prediction layers the files hold; config.json often names one that is not there."""
        return sum(name.endswith(".eh_proj.weight") for name in self.file_of)

    def ordered(self, names: Sequence[str]) -> list[str]:
        """`names` file after file. DataError if the folder lacks some."""
        if missing := [name for name in names if name not in self.file_of]:
            raise DataError(f"{self.folder} lacks {len(missing)} tensors that {CONFIG} asks for: {_some(missing)}")
        return sorted(names, key=lambda name: (self.file_of[name], name))

    def read(self, name: str) -> Tensor:
        """The tensor in float32 or its own, smaller, floating dtype."""
        weight = self._raw(name)
        if weight.dtype == torch.float8_e4m3fn:
            scale = f"{name}_scale_inv"
            if scale not in self.file_of:
                raise DataError(f"{self.folder}: {name} is float8 and has no {scale}; only block-scaled FP8 is read")
            return dequantise(weight, self._raw(scale), self.block, name)
        if weight.dtype not in _DTYPES.values():
            valid = ", ".join([*_DTYPES, "float8_e4m3fn with block scales"])
            raise DataError(f"{self.folder}: {name} is {weight.dtype}; valid: {valid}")
        return weight

    def rounding(self, name: str) -> Tensor | None:
        """What `unfold` takes; None when folding `name` lost nothing, or another program wrote the folder."""
        path = self.folder / ROUNDING
        if not path.is_file():
            return None
        with _reading(path):
            file = self._open(path)
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - not a dict

    def _raw(self, name: str) -> Tensor:
        self.used.add(name)
        path = self.folder / self.file_of[name]
        with _reading(path):
            return self._open(path).get_tensor(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or incomplete ({error}); copy it again") from error


def _file_of(folder: Path) -> dict[str, str]:
    """{tensor: file} from the index, or from the only file's own header."""
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) and Path(f).name == f for f in names.values()):
            raise DataError(f"{folder / INDEX}: weight_map must map tensor names to file names of that folder")
        if missing := sorted(f for f in set(names.values()) if not (folder / f).is_file()):
            raise DataError(f"{folder} lacks {len(missing)} files that its index lists: {_some(missing)}")
        return names
    path = folder / WEIGHTS
    if not path.is_file():
        raise DataError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    with _reading(path), safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128), name: str = "weight") -> Tensor:
    """weight_ij * scale_(i // block rows, j // block columns) in float32 (DeepSeek-V3, 2412.19437 section 3.3).

    Args:
        weight: float8_e4m3fn (out, in); neither needs to be a multiple of the block.
        scale: float32 (ceil(out / block rows), ceil(in / block columns)).
    """
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if tuple(scale.shape) != expected:
        raise DataError(f"{name}_scale_inv has shape {tuple(scale.shape)}; {tuple(weight.shape)} needs {expected}")
    rows, columns = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))
    return weight.float() * scale.float()[rows][:, columns]


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


def _fill(target: Tensor, name: str, shards: _Shards, config: ModelConfig, folded: bool, halves: bool) -> None:
    """Copies the checkpoint's tensor into our place for it; no reference to it stays."""
    source = shards.read(name)
    if source.shape != target.shape:
        raise DataError(f"{name} has shape {tuple(source.shape)}; {CONFIG} asks for {tuple(target.shape)}")
    if folded and config.residual_scale != 1:
        source = unfold(source, config.residual_scale, shards.rounding(name))
    target.copy_(_interleave(name, source, config) if halves else source)


def _check_repeated(target: Tensor, name: str, shards: _Shards) -> None:
    source = shards.read(name)
    if source.shape != target.shape or not torch.equal(source.to(target.dtype), target):
        raise DataError(
            f"{shards.folder}: {name} differs from the trunk's own; a multi-token-prediction layer with an embedding "
            "or a head of its own cannot be expressed"
        )


def _check_leftovers(shards: _Shards) -> None:
    """Every tensor must have been read, but for stored rotary tables."""
    left = [name for name in shards.file_of if name not in shards.used and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise DataError(f"{shards.folder} holds {len(left)} tensors that our model has no place for: {_some(left)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give a folder with {CONFIG} and safetensors") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a {type(document).__name__}, expected an object")
    return document


# --- weights out -----------------------------------------------------------------------------------------------------


def fold(weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """weight * scale, rounded to weight's dtype, and what makes `unfold` exact: units in the last place, an integer
    tensor (all 0 for a power of two, but for underflow)."""
    folded = (weight.double() * scale).to(weight.dtype)
    rounding = _bits(weight) - _bits(unfold(folded, scale))
    return folded, rounding if rounding.abs().max() > 127 else rounding.to(torch.int8)


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
    plan = list(_shard(places, tensors, max_shard_bytes))
    file_of, rounding = {}, {}
    for i, names in enumerate(plan, start=1):
        file = WEIGHTS if len(plan) == 1 else f"model-{i:05}-of-{len(plan):05}.safetensors"
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
        total = sum(_nbytes(slot.view(tensors)) for slot in places.values())
        (folder / INDEX).write_text(_to_json({"metadata": {"total_size": total}, "weight_map": file_of}))
    if rounding:
        save_file(rounding, folder / ROUNDING)


def _shard(places: Mapping[str, Slot], tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, cut before a shard would exceed `limit` bytes."""
    names: list[str] = []
    size = 0
    for name, slot in places.items():
        bytes_ = _nbytes(slot.view(tensors))
        if names and size + bytes_ > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    yield names


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"
