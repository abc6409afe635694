"""Maximal update parametrisation: one table from a parameter's role to its initial std and AdamW multipliers.

Sources: Tensor Programs V (2203.03466) for width, CompleteP (2505.01618, alpha = 1) for depth, 2601.20205 rule 1 for
router and experts. Latent attention has no published table: its rows follow from the rule below, because every matrix
of it reads a normalised input.

    y = W x with x of unit RMS. Adam moves every entry by about its learning rate, in step with x, so
        learning rate * fan_in must not depend on the width        -> lr     x fan_in0 / fan_in
        initial entries add up incoherently                        -> std    = c / sqrt(fan_in)
        decay per step is lr * weight_decay and must stay the same  -> decay  x fan_in / fan_in0
        gradients of block parameters shrink like 1 / (m m_L)       -> eps    / (m m_L)

    role        init std           lr     weight decay   eps            where
    embedding   embed_std          1      0              1/m            token embedding
    norm        1 (constant)       1      0              1/(m m_L)      every RMSNorm gain
    hidden      c/sqrt(fan_in)     1/m_i  m_i            1/(m m_L)      attention and dense SwiGLU matrices
    router      c/sqrt(fan_in)     1/m_i  m_i            1/(m m_L)      router weight
    expert      c/sqrt(fan_in)     1/m_i  m_i            1/(m m_L)      stacked expert matrices (E, out, in)
    head        c sqrt(d0)/d       1/m    m              1              LM head (forward multiplier 1)

    m = width / base width, m_i = fan_in / base fan_in of that matrix, m_L = depth / base depth.
    The final norm lies outside the blocks but sees the head's 1/m gradient, hence the same eps as theirs without m_L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_reason.models.config import ModelConfig
from lit_reason.models.layers import RMSNorm
from lit_reason.models.moe import Experts, Router


@dataclass(frozen=True, slots=True)
class Role:
    """What the table says of one parameter.

    Args:
        kind: the table's row.
        init_std: standard deviation of the initial normal distribution; None leaves the constant 1 of a norm's gain.
        lr, weight_decay, eps: multipliers on the base hyper-parameters of AdamW.
    """

    kind: str
    init_std: float | None
    lr: float
    weight_decay: float
    eps: float

    def init(self, parameter: Tensor) -> None:
        if self.init_std is None:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=self.init_std)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Role of every parameter by name, from module types and the base shape.

    Models that are not ours get multiplier 1: matrices of Linear layers decay, everything else does not.
    """
    from lit_reason.models.transformer import Transformer

    roles: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Transformer):
            roles |= {_join(prefix, name): role for name, role in _our_roles(module).items()}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=prefix, recurse=False):
            if name not in roles:
                decays = isinstance(module, nn.Linear) and name.endswith("weight")
                roles[name] = Role("matrix" if decays else "other", None, 1.0, float(decays), 1.0)
    return roles


def _our_roles(model: nn.Module) -> dict[str, Role]:
    from lit_reason.models.transformer import Transformer

    assert isinstance(model, Transformer)
    config = model.config
    with torch.device("meta"):
        base_shapes = {name: p.shape for name, p in Transformer(config.base_config()).named_parameters()}
    m, depth = config.width / config.base.width, config.depth / config.base.depth
    roles = {}
    for name, kind in _kinds(model).items():
        shape = model.get_parameter(name).shape
        eps = 1 / (m * depth) if name.startswith("blocks.") else 1 / m
        roles[name] = _role(kind, config, fan_in=shape[-1], base_fan_in=base_shapes[name][-1], eps=eps)
    return roles


def _role(kind: str, config: ModelConfig, fan_in: int, base_fan_in: int, eps: float) -> Role:
    """The table's row `kind` for a matrix of this fan-in."""
    if kind == "embedding":
        return Role(kind, config.embed_std, 1.0, 0.0, eps)
    if kind == "norm":
        return Role(kind, None, 1.0, 0.0, eps)
    ratio = fan_in / base_fan_in
    if kind == "head":
        return Role(kind, config.init_gain * math.sqrt(base_fan_in) / fan_in, 1 / ratio, ratio, 1.0)
    return Role(kind, config.init_gain / math.sqrt(fan_in), 1 / ratio, ratio, eps)


_KIND_OF: list[tuple[type[nn.Module], str]] = [
    (nn.Embedding, "embedding"),
    (RMSNorm, "norm"),
    (Router, "router"),
    (Experts, "expert"),
    (nn.Linear, "hidden"),
]


def _kinds(model: nn.Module) -> dict[str, str]:
    kinds = {}
    head = model.head
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=prefix, recurse=False):
            kinds[name] = "head" if module is head else next(kind for cls, kind in _KIND_OF if isinstance(module, cls))
    return kinds


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
