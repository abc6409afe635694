"""Several update rules behind one optimizer: Lightning's automatic optimisation takes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_reason.models.mup import Matrices, Role, parameter_roles
from lit_reason.optim.groups import parameter_groups
from lit_reason.optim.recipe import Recipe, check_above_zero

Layout = Mapping[Any, Matrices]  # how each parameter splits into matrices


class Composite(Optimizer):
    """Steps its parts one after the other, as one optimizer with all their groups and states.

    Groups and states are the parts' own objects, so a schedule, clipping and `state_dict` reach every part.

    Example::

        optimizer = Composite([Muon(matrix_groups, layout), torch.optim.AdamW(other_groups)])

    Args:
        parts: optimizers over different parameters. They must read groups and states anew in every step.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts: list[Optimizer] = []
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._sizes = [len(part.param_groups) for part in parts]
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.parts:
            raise RuntimeError("a composite optimizer takes no new group: give it to one of the parts before")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:  # the end of load_state_dict, with new groups and states
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part, size in zip(self.parts, self._sizes, strict=True):
            part.param_groups = [next(groups) for _ in range(size)]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class MatrixRule(Optimizer, ABC):
    """A part of the composite that updates every parameter that has a gradient, knowing its matrices.

    Args:
        groups: parameter groups; what they hold is read from them in every step.
        defaults: of the groups' hyper-parameters.
        layout: the matrices of every parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any], layout: Layout) -> None:
        super().__init__(groups, defaults)
        self.layout = layout

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the composite calls it"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter, in place."""


@dataclass
class MatrixRecipe(Recipe):
    """Matrices by a rule of their own; embedding, head, norms and router by AdamW.

    Args:
        lr: learning rate of the matrices at the base width.
        adamw_lr: the others' learning rate at the base width; None is `lr`.
        betas, eps, weight_decay, schedule, warmup_steps, final_fraction: as in `AdamW`.
    """

    adamw_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adamw_lr is not None:
            check_above_zero("adamw_lr", self.adamw_lr)

    def optimizer(self, model: nn.Module) -> Optimizer:
        roles = parameter_roles(model)
        rest = {name: role for name, role in roles.items() if role.matrices is None}
        named = dict(model.named_parameters())
        layout = {named[name]: role.matrices for name, role in roles.items() if role.matrices and name in named}
        parts: list[Optimizer] = []
        matrices = {name: self.matrix_role(role) for name, role in roles.items() if role.matrices}
        if groups := self._groups(model, matrices, self.lr):
            parts.append(self.matrix_optimizer(groups, layout))
        if groups := self._groups(model, rest, self.lr if self.adamw_lr is None else self.adamw_lr):
            parts.append(torch.optim.AdamW(groups, betas=self.betas, foreach=True))
        return Composite(parts)

    def _groups(self, model: nn.Module, roles: Mapping[str, Role], lr: float) -> list[dict[str, Any]]:
        return parameter_groups(model, lr=lr, weight_decay=self.weight_decay, eps=self.eps, roles=roles)

    def matrix_role(self, role: Role) -> Role:
        """The multipliers of a matrix's group: none where the rule scales every matrix by its own shape."""
        return replace(role, lr=1.0, weight_decay=1.0)

    @abstractmethod
    def matrix_optimizer(self, groups: list[dict[str, Any]], layout: Layout) -> Optimizer:
        """The rule of the matrices."""
