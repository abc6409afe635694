"""Parameter groups from roles: never from a parameter's name or number of dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lit_reason.models.mup import Role, parameter_roles


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, eps: float, roles: Mapping[str, Role] | None = None
) -> list[dict[str, Any]]:
    """One AdamW group for each distinct (role, multipliers) among the trainable parameters.

    Every group carries `name`, its role, with the learning-rate multiplier where a role has several
    (`"hidden/lr x0.5"`), so that logs and schedules can tell them apart.

    Args:
        lr, weight_decay, eps: at the base width.
        roles: of the parameters that are wanted, by name; those of the whole model by default.
    """
    roles = parameter_roles(model) if roles is None else roles
    members: dict[Role, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in roles:
            role = roles[name]
            key = Role(role.kind, None, role.lr, role.weight_decay, role.eps, factor=role.factor)
            members.setdefault(key, []).append(parameter)
    kinds = [role.kind for role in members]
    return [
        {
            "name": role.kind
            if kinds.count(role.kind) == 1
            else f"{role.kind}/lr x{role.lr * role.factor:g} eps x{role.eps:g}",
            "params": parameters,
            "lr": lr * role.lr * role.factor,
            "weight_decay": weight_decay * role.weight_decay,
            "eps": eps * role.eps,
        }
        for role, parameters in members.items()
    ]
