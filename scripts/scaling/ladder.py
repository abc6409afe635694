"""The same model at several widths and depths, under muP or under the standard parametrisation.

The schemes
    mup   the table of `lit_reason.models.mup`, from the ladder's base width and depth.
    sp    the control: at every size each parameter has the initial std, learning rate, weight decay and eps that it has
          at the base width, and residual branches are not scaled by the depth. At the base size both are the same
          model, number by number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lit_reason.config import instantiate
from lit_reason.config.compose import compose
from lit_reason.models import Base, ModelConfig, Transformer, parameter_roles
from lit_reason.optim import OptimizerRecipe

SCHEMES = ("mup", "sp")
HEAD_DIM = 32  # of queries and keys, half of it rotary, and of values; the same at every width


@dataclass(frozen=True)
class Ladder:
    """A mixture of experts with latent attention whose every dimension but the heads' grows with the width.

    Args:
        base_width, base_depth: where the hyper-parameters are meant; widths are multiples of 64.
        vocab_size, seq_len: of the text.
        experts, experts_per_token: the same at every size.
        branch_gain: of `ModelConfig`.
    """

    base_width: int = 64
    base_depth: int = 3
    vocab_size: int = 272
    seq_len: int = 64
    experts: int = 8
    experts_per_token: int = 2
    branch_gain: float = 1.0

    def config(self, width: int, depth: int) -> ModelConfig:
        """The shape under muP. The first third of the blocks is dense, the same share at every depth."""
        if width % 64 or self.base_width % 64:
            raise SystemExit(f"width {width}, base width {self.base_width}: give multiples of 64")
        scaled = _scaled(width)
        return ModelConfig(
            vocab_size=self.vocab_size, max_seq_len=self.seq_len, width=width,
            depth=depth, first_dense=max(1, depth // 3),
            qk_nope_head_dim=HEAD_DIM // 2, qk_rope_head_dim=HEAD_DIM // 2, v_head_dim=HEAD_DIM,
            experts=self.experts, experts_per_token=self.experts_per_token, shared_experts=1,
            branch_gain=self.branch_gain, **scaled,
            base=Base(width=self.base_width, depth=self.base_depth, **_scaled(self.base_width)),
        )  # fmt: skip

    @torch.no_grad()
    def model(self, width: int, depth: int, scheme: str, seed: int) -> Transformer:
        """The model at its start; a seed gives the same weights whatever ran before."""
        config = self.config(width, depth)
        named = config if scheme == "mup" else config.base_config()  # whose spreads count
        with torch.device("meta"):
            roles = parameter_roles(Transformer(named))
        model = Transformer(config if scheme == "mup" else replace(config, base=Base(width=width, depth=depth)))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            roles[name].init(parameter)
        return model


def _scaled(width: int) -> dict[str, Any]:
    return {
        "heads": width // HEAD_DIM,
        "q_lora_rank": width // 2,
        "kv_lora_rank": width // 4,
        "ffn_width": 3 * width,
        "expert_width": width // 2,
    }


def recipe(name: str, lr: float | None = None, settings: tuple[str, ...] = (), **fixed: Any) -> OptimizerRecipe:
    """The recipe `conf/optimizer/<name>.yaml`; a given `lr` takes its other rates (`adamw_lr`) along in proportion.

    Args:
        lr: at the base width; None is the file's.
        settings: changes such as `"weight_decay=0"`.
        fixed: arguments that win over both, e.g. a schedule.
    """
    config = optimizer_config(name, settings)
    rates = [key for key, value in config.items() if str(key).endswith("lr") and value is not None]
    factor = 1.0 if lr is None else lr / config["lr"]
    return instantiate(OmegaConf.to_container(config), **{str(key): config[key] * factor for key in rates}, **fixed)


@cache
def optimizer_config(name: str, settings: tuple[str, ...] = ()) -> DictConfig:
    """The YAML of an optimizer with changes, checked as on the command line."""
    overrides = [f"optimizer={name}", *(f"optimizer.{setting}" for setting in settings)]
    return compose("train", overrides).optimizer
