"""config.json of the DeepSeek-V2 / V3 family <-> `ModelConfig`; what cannot be expressed is refused, either way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lit_reason.errors import ConfigError, nearest
from lit_reason.models.config import Base, ModelConfig, Yarn

CONFIG = "config.json"
LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm in transformers, whatever rms_norm_eps says
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


_OURS = ("init_gain", "branch_gain", "embed_std", "mtp_loss")  # what the format has no key for; old exports lack some


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
    ours = {key: _number(mup, key, float) for key in _OURS if key in mup}
    centred = mup.get("centre_bias", False)
    if not isinstance(centred, bool):
        raise ConfigError(f"mup.centre_bias={centred!r}: must be true or false")
    config = ModelConfig.from_dict({**config.to_dict(), "base": base, "centre_bias": centred, **ours})
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
        **{key: getattr(config, key) for key in (*_OURS, "centre_bias")},
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


def dtype_of(values: Mapping[str, Any]) -> torch.dtype:
    if values.get("quantization_config"):
        return torch.bfloat16
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r}: {nearest(str(name), DTYPES)}")
    return DTYPES[name]


def fp8_block(values: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale of an FP8 checkpoint."""
    quantization = values.get("quantization_config") or {}
    _refuse_unless(quantization, "quant_method", (None, "fp8"))
    block = quantization.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ConfigError(f"quantization_config.weight_block_size={block!r}: must be two integers such as [128, 128]")
    return block[0], block[1]
