"""The model's shape: one validated dataclass, a plain-JSON round trip, nothing else decides a dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lit_reason.errors import ConfigError, nearest


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (2309.00071) as DeepSeek-V3 uses it.

    Args:
        factor: context length over `original_max_seq_len`.
        original_max_seq_len: length that the unscaled rotary embedding was trained on (tokens).
        beta_fast, beta_slow: rotations over the original length between which the ramp interpolates.
        mscale, mscale_all_dim: attention-temperature coefficients; cos and sin are multiplied by
            `m(mscale) / m(mscale_all_dim)`, the softmax scale by `m(mscale_all_dim)**2`; m(c) = 0.1 c ln(factor) + 1.
    """

    factor: float = 40.0
    original_max_seq_len: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class Base:
    """The base shape of muP: where hyper-parameters were tuned. Multipliers are ratios to it (2203.03466).

    `None` means "this axis is not scaled": the base has the model's own value.
    """

    width: int = 64
    depth: int = 4
    heads: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    ffn_width: int | None = None
    expert_width: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder with multi-head latent attention and mixture of experts (DeepSeek-V3, 2412.19437).

    Example::

        ModelConfig(width=128, depth=4, heads=4, experts=8, experts_per_token=2)

    Args:
        vocab_size: rows of the embedding and of the (untied) head.
        width, depth, heads: model width D, number of blocks, attention heads H.
        q_lora_rank: rank of the query's latent; None projects queries directly from the width.
        kv_lora_rank: rank of the key/value latent, which is all that the cache keeps besides the rotary key.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: per-head dimensions without and with rotation, and of values.
        ffn_width: hidden width of the dense SwiGLU blocks.
        first_dense: number of leading blocks that are dense.
        experts, experts_per_token, expert_width: routed experts E, chosen K, hidden width of each.
        shared_experts: experts that every token uses (their hidden width is `shared_experts * expert_width`).
        expert_groups, groups_per_token: group-limited routing; 1 and 1 switch it off.
        scoring: a token's score of an expert: "sigmoid" of its logit (DeepSeek-V3), or "softmax" over experts (V2).
        group_score: what ranks a group: "top2", the sum of its two best biased scores (V3), or "max", its best (V2).
        norm_topk_prob: divide the chosen experts' scores by their sum (V3); V2 uses them as they are.
        routed_scale: factor on the routing weights, after they were normalised.
        balance_loss: coefficient of the sequence-wise balance loss (2412.19437 eq. 17-20).
        centre_bias: keep the mean of the balancing biases at 0; they choose the same experts either way.
        mtp_depth: multi-token-prediction modules after the trunk (eq. 21-25): how many tokens beyond the next one the
            supervised stages also learn to predict. They draft for speculative decoding and are no part of the policy.
        mtp_loss: coefficient of their mean loss.
        max_seq_len: positions that the model may see (tokens).
        rope_theta, yarn: base of the rotary frequencies; their extension to a longer context, None for none.
        norm_eps: added to the mean square in every RMSNorm.
        latent_norm_eps: the same for the two norms of the latents; None is `norm_eps`. transformers has 1e-6 there
            whatever `rms_norm_eps` says.
        init_gain: c of the initial standard deviation c / sqrt(fan_in).
        branch_gain: factor on it for the matrices that end a residual branch (attention's output and every down
            projection). 0 starts each block as the identity: training then moves the residual stream by the same amount
            at every depth (docs/mup.md).
        embed_std: initial standard deviation of the embedding, the same at every width.
        base: muP base shape.
    """

    vocab_size: int = 272
    width: int = 128
    depth: int = 4
    heads: int = 4
    q_lora_rank: int | None = None
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    ffn_width: int = 384
    first_dense: int = 1
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 96
    shared_experts: int = 1
    expert_groups: int = 1
    groups_per_token: int = 1
    scoring: str = "sigmoid"
    group_score: str = "top2"
    norm_topk_prob: bool = True
    routed_scale: float = 1.0
    balance_loss: float = 1e-4
    centre_bias: bool = False
    mtp_depth: int = 0
    mtp_loss: float = 0.3
    max_seq_len: int = 256
    rope_theta: float = 10_000.0
    yarn: Yarn | None = None
    norm_eps: float = 1e-6
    latent_norm_eps: float | None = None
    init_gain: float = 1.0
    branch_gain: float = 1.0
    embed_std: float = 1.0
    base: Base = field(default_factory=Base)

    def __post_init__(self) -> None:
        for name, cls in (("base", Base), ("yarn", Yarn)):  # YAML and JSON give mappings
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, _from_mapping(cls, value, f"model.{name}."))
        _check_positive(self, "model.", _POSITIVE)
        _check_positive(self.base, "model.base.", tuple(f.name for f in fields(Base)))
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"model.qk_rope_head_dim={self.qk_rope_head_dim}: must be even (rotations act on pairs)")
        if not 0 <= self.first_dense <= self.depth:
            raise ConfigError(f"model.first_dense={self.first_dense}: valid 0..depth={self.depth}")
        if self.mtp_depth < 0 or self.mtp_loss < 0:
            raise ConfigError(
                f"model.mtp_depth={self.mtp_depth}, model.mtp_loss={self.mtp_loss}: valid 0 (no such module) and above"
            )
        for name in ("init_gain", "branch_gain", "embed_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"model.{name}={value!r}: valid a number, 0 or above, e.g. model.{name}=1.0")
        if self.moe_layers:
            self._check_routing()

    def _check_routing(self) -> None:
        _check_positive(self, "model.", ("experts", "expert_width", "expert_groups"))
        _check_choice("model.scoring", self.scoring, SCORINGS)
        _check_choice("model.group_score", self.group_score, GROUP_SCORES)
        groups, kept = self.expert_groups, self.groups_per_token
        if self.experts % groups:
            raise ConfigError(f"model.experts={self.experts} is not divisible by model.expert_groups={groups}")
        if not 1 <= kept <= groups:
            raise ConfigError(f"model.groups_per_token={kept}: valid 1..expert_groups={groups}")
        if groups > 1 and self.experts // groups < 2 and self.group_score == "top2":
            raise ConfigError(
                f"model.expert_groups={groups} leaves {self.experts // groups} expert a group; a group's score is the "
                f"sum of its two best, so at least 2 are needed: type model.expert_groups={self.experts // 2} or fewer"
            )
        reachable = kept * self.experts // groups
        if not 1 <= self.experts_per_token <= reachable:
            raise ConfigError(
                f"model.experts_per_token={self.experts_per_token}: valid 1..{reachable} "
                f"(groups_per_token * experts / expert_groups)"
            )
        if self.shared_experts < 0:
            raise ConfigError(f"model.shared_experts={self.shared_experts}: must be at least 0")

    @property
    def moe_layers(self) -> int:
        return self.depth - self.first_dense

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_eps(self) -> float:
        """eps of the RMSNorms of the query's and the key/value latents."""
        return self.norm_eps if self.latent_norm_eps is None else self.latent_norm_eps

    @property
    def residual_scale(self) -> float:
        """1 / m_L, the factor on every residual branch (CompleteP, 2505.01618, alpha = 1)."""
        return self.base.depth / self.depth

    def base_config(self) -> ModelConfig:
        """The same architecture at muP's base width (depth enters only through `residual_scale` and eps)."""
        scaled = ("width", "heads", "q_lora_rank", "kv_lora_rank", "ffn_width", "expert_width")
        values = {n: v for n in scaled if (v := getattr(self.base, n)) is not None}
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` gives an equal config back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Builds a config from JSON values.

        Raises:
            ConfigError: for an unknown key, with the nearest valid names.
        """
        return _from_mapping(cls, values, "model.")


SCORINGS = ("sigmoid", "softmax")
GROUP_SCORES = ("top2", "max")
_POSITIVE = (
    "vocab_size", "width", "depth", "heads", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim",
    "ffn_width", "max_seq_len",
)  # fmt: skip


def _check_positive(values: Any, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(values, name)
        if value is not None and value < 1:
            raise ConfigError(f"{prefix}{name}={value}: must be at least 1")


def _check_choice(key: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{key}={value!r}: {nearest(str(value), valid)}")


def _from_mapping(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    valid = {f.name for f in fields(cls)}
    for key in values:
        if key not in valid:
            raise ConfigError(f"unknown key {prefix}{key}: {nearest(key, valid)}")
    return cls(**values)
