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
    lora_a      1/sqrt(3 fan_in)   1/m_i  m_i            as its matrix  A of an adapter B A; m_i is its matrix's
    lora_b      0                  1      1              as its matrix  B: its fan-in is the rank at every width
    lora_norm   the row's norm     1      0              as its matrix  DoRA's magnitude
    value       0                  1/m    0              1              a critic's value head

    The matrices that end a residual branch (W_O and every down projection) start at `branch_gain` times that spread.

    Muon's update of a matrix is sqrt(fan_out / fan_in) times an orthogonal one at every width (2310.17813), so it needs
    to know the matrices: `Role.matrices` says which rows of a parameter are one linear map. It decays by lr *
    weight_decay without that factor. Embedding, norms, router and head have no matrices: they stay with AdamW.

    Adapters are peft's, initial values included: A x is of unit size at every width, and B's rate need not fall with it
    (LoRA+, 2402.12354: the rates of A and B go as 1/width and 1). A's gradient does not shrink with the width: its eps
    is smaller than it need be. Adapters have no matrices either.

    m = width / base width, m_i = fan_in / base fan_in of that matrix, m_L = depth / base depth.
    The final norm lies outside the blocks but sees the head's 1/m gradient, hence the same eps as theirs without m_L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lit_reason.models.adapters import adapted_layers, adapted_parameter, adapters, plain_name
from lit_reason.models.config import ModelConfig
from lit_reason.models.critic import Critic
from lit_reason.models.layers import RMSNorm, SwiGLU
from lit_reason.models.mla import MLA
from lit_reason.models.moe import Experts, Router


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear map among a parameter's rows: its shape, and its shape at muP's base.

    Args:
        name: what the rows compute: "query", "key", "value", "latent", "key_rope", "gate_up" or "matrix".
    """

    name: str
    fan_out: int
    fan_in: int
    base_fan_out: int
    base_fan_in: int


@dataclass(frozen=True, slots=True)
class Matrices:
    """Which rows of a parameter (*stack, out, in) are one linear map.

    Example::

        kv_b = Matrices(heads, (Matrix("key", 16, 64, 16, 64), Matrix("value", 32, 64, 32, 64)))
        key_HNC, value_HVC = kv_b.split(layer.kv_b.weight)

    Args:
        repeats: how often the rows repeat the same blocks, e.g. once per head.
        blocks: one after the other in the rows of one repeat.
    """

    repeats: int
    blocks: tuple[Matrix, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One view (*stack, repeats, fan_out, fan_in) per block."""
        return tensor.unflatten(-2, (self.repeats, -1)).split([block.fan_out for block in self.blocks], dim=-2)


@dataclass(frozen=True, slots=True)
class Role:
    """What the table says of one parameter.

    Args:
        kind: the table's row.
        init_std: standard deviation of the initial normal distribution; None leaves the constant 1 of a norm's gain.
        lr, weight_decay, eps: multipliers on the base hyper-parameters of AdamW.
        matrices: the linear maps that the parameter holds; None keeps it from optimizers of matrices.
        factor: on the learning rate, whatever the optimizer: somebody's choice, not the parametrisation's.
    """

    kind: str
    init_std: float | None
    lr: float
    weight_decay: float
    eps: float
    matrices: Matrices | None = None
    factor: float = 1.0

    def init(self, parameter: Tensor) -> None:
        if self.init_std is None:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=self.init_std)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Role of every parameter by name, from module types and the base shape.

    Models that are not ours get multiplier 1: matrices of Linear layers decay, everything else does not. Each is one
    matrix, but for the output layer that a Hugging Face model names (`get_output_embeddings`). Adapters have roles of
    their own, after that of what they adapt.
    """
    from lit_reason.models.transformer import Transformer

    roles: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Transformer):
            roles |= {_join(prefix, name): role for name, role in _our_roles(module).items()}
    heads = [get() for m in model.modules() if callable(get := getattr(m, "get_output_embeddings", None))]
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if name not in roles:
                decays = isinstance(module, nn.Linear) and name.endswith("weight")
                whole = decays and not any(module is head for head in heads)
                matrices = _matrices(parameter.shape, parameter.shape) if whole else None
                roles[name] = Role("matrix" if decays else "other", None, 1.0, float(decays), 1.0, matrices)
    return roles | _adapter_roles(model, roles) | _critic_roles(model, roles)


def _adapter_roles(model: nn.Module, roles: dict[str, Role]) -> dict[str, Role]:
    """Roles of the adapters' own parameters, given those of what they adapt."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for prefix, layer in adapted_layers(model).items():
        module, name = adapted_parameter(layer)
        weight = module.get_parameter(name)
        base = roles[name_of[id(weight)]]
        std = 1 / math.sqrt(3 * weight.shape[-1])
        own = {
            "lora_A": replace(base, kind="lora_a", init_std=std, matrices=None),
            "lora_B": Role("lora_b", 0.0, 1.0, float(base.weight_decay > 0), base.eps),
            "lora_magnitude_vector": Role("lora_norm", None, 1.0, 0.0, base.eps),
        }
        for part, role in own.items():
            for parameter, _ in layer.get_submodule(part).named_parameters(prefix=_join(prefix, part)):
                found[parameter] = role
    return found


def _critic_roles(model: nn.Module, roles: dict[str, Role]) -> dict[str, Role]:
    """The value head is a readout; every parameter of a critic has the critic's factor."""
    found = {}
    for prefix, critic in model.named_modules():
        if isinstance(critic, Critic):
            found[_join(prefix, "head.weight")] = Role("value", 0.0, 1 / critic.width_ratio, 0.0, 1.0)
            own = {
                name: role for name, role in (roles | found).items() if name.startswith(f"{prefix}." if prefix else "")
            }
            found |= {name: replace(role, factor=critic.lr_factor) for name, role in own.items()}
    return found


def _our_roles(model: nn.Module) -> dict[str, Role]:
    from lit_reason.models.transformer import Transformer

    assert isinstance(model, Transformer)
    config = model.config
    if adapters(model):  # what its modules are is hidden behind peft's
        with torch.device("meta"):
            roles = _our_roles(Transformer(config))
        return {name: roles[plain] for name, _ in model.named_parameters() if (plain := plain_name(name)) in roles}
    with torch.device("meta"):
        base = Transformer(config.base_config())
    rows, base_rows, ends = _row_blocks(model), _row_blocks(base), _branch_ends(model)
    m, depth = config.width / config.base.width, config.depth / config.base.depth
    roles = {}
    for name, kind in _kinds(model).items():
        shape, base_shape = model.get_parameter(name).shape, base.get_parameter(name).shape
        eps = 1 / (m * depth) if name.startswith("blocks.") else 1 / m
        role = _role(kind, config, fan_in=shape[-1], base_fan_in=base_shape[-1], eps=eps)
        if name in ends:
            assert role.init_std is not None
            role = replace(role, init_std=config.branch_gain * role.init_std)
        if kind in ("hidden", "expert"):
            role = replace(role, matrices=_matrices(shape, base_shape, rows.get(name), base_rows.get(name)))
        roles[name] = role
    return roles


Rows = tuple[int, dict[str, int]]  # repeats, and the rows of each block in one repeat


def _matrices(
    shape: Sequence[int], base_shape: Sequence[int], rows: Rows | None = None, base: Rows | None = None
) -> Matrices:
    """A parameter's matrices from its shape and row blocks, here and at the base; without blocks it is one matrix."""
    repeats, blocks = rows or (1, {"matrix": shape[-2]})
    base_blocks = (base or (1, {"matrix": base_shape[-2]}))[1]
    fan_in, base_fan_in = shape[-1], base_shape[-1]
    found = (Matrix(name, n, fan_in, base_blocks[name], base_fan_in) for name, n in blocks.items() if n)
    return Matrices(repeats, tuple(found))


def _row_blocks(model: nn.Module) -> dict[str, Rows]:
    """The parameters that hold several matrices, by the modules that use them so."""
    rows: dict[str, Rows] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, MLA):
            q = "q" if isinstance(module.q, nn.Linear) else "q.2"
            rows[_join(prefix, f"{q}.weight")] = module.heads, {"query": module.nope + module.rope}
            rows[_join(prefix, "kv_a.weight")] = 1, {"latent": module.latent, "key_rope": module.rope}
            rows[_join(prefix, "kv_b.weight")] = module.heads, {"key": module.nope, "value": module.value}
        elif isinstance(module, SwiGLU):
            rows[_join(prefix, "gate_up.weight")] = 2, {"gate_up": module.down.in_features}
        elif isinstance(module, Experts):
            rows[_join(prefix, "gate_up")] = 2, {"gate_up": module.down.shape[-1]}
    return rows


def _branch_ends(model: nn.Module) -> set[str]:
    """The parameters whose products are added to the residual stream."""
    ends = set()
    for prefix, module in model.named_modules():
        if isinstance(module, MLA):
            ends.add(_join(prefix, "out.weight"))
        elif isinstance(module, SwiGLU):
            ends.add(_join(prefix, "down.weight"))
        elif isinstance(module, Experts):
            ends.add(_join(prefix, "down"))
    return ends


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
