"""SOAP (2409.11321) and Shampoo (1802.09568), from the package pytorch_optimizer, on every matrix by itself.

A matrix's learning rate is multiplied by sqrt(fan_out / fan_in) relative to muP's base (2512.05620: without blocking,
and Shampoo with the exponent 1/4 on either side). The package takes a stack of experts for one tensor of three
dimensions and would precondition across experts; here it is given two-dimensional views."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_reason.errors import ConfigError
from lit_reason.models.mup import Matrix
from lit_reason.optim.composite import Layout, MatrixRecipe

Groups = list[dict[str, Any]]


class PerMatrix(Optimizer):
    """Runs another optimizer on the single matrices of its parameters.

    Its own groups hold the parameters, so that clipping and `zero_grad` find the gradients; in every step the other
    optimizer's parameters are made views of them. The state of a parameter is the list of its matrices' states.

    Args:
        groups: parameter groups; `lr`, `eps` and `weight_decay` are read from them in every step.
        layout: the matrices of every parameter.
        make: builds the other optimizer from its groups. It must keep tensors, numbers and lists of them in `state`,
            and at most a counter `step` in a group.
    """

    def __init__(self, groups: Groups, layout: Layout, make: Callable[[Groups], Optimizer]) -> None:
        super().__init__(groups, {"lr": 2**-8, "eps": 1e-8, "weight_decay": 0.0})
        self.layout = layout
        self._inner_groups = {p: self._make_groups(p) for group in self.param_groups for p in group["params"]}
        self.inner = make([group for groups in self._inner_groups.values() for group in groups])

    def _make_groups(self, parameter: Tensor) -> Groups:
        """One group per block, whose parameters are the block's matrices."""
        return [{"params": [m.requires_grad_() for m in views]} for views in self._single(parameter, parameter)]

    def _single(self, tensor: Tensor, parameter: Tensor) -> list[list[Tensor]]:
        """Per block, the two-dimensional views of a tensor of the parameter's shape."""
        views = self.layout[parameter].split(tensor.detach())
        return [list(view.view(-1, *view.shape[-2:]).unbind()) for view in views]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the composite calls it"
        for group in self.param_groups:
            for parameter in group["params"]:
                self._lend(parameter, group)
        self.inner.step()
        for parameter, inner_groups in self._inner_groups.items():
            self._take_back(parameter, inner_groups)

    def _lend(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Hand hyper-parameters, weights, gradients and state (which may have been loaded) to the other optimizer."""
        inner_groups, blocks = self._inner_groups[parameter], self.layout[parameter].blocks
        for inner, block, weights in zip(inner_groups, blocks, self._single(parameter, parameter), strict=True):
            factor = lr_factor(block)
            inner |= {"lr": group["lr"] * factor, "eps": group["eps"], "weight_decay": group["weight_decay"] / factor}
            for matrix, weight in zip(inner["params"], weights, strict=True):
                matrix.data = weight
        if parameter.grad is not None:
            for inner, gradients in zip(inner_groups, self._single(parameter.grad, parameter), strict=True):
                for matrix, gradient in zip(inner["params"], gradients, strict=True):
                    matrix.grad = gradient
        if parameter in self.state:
            saved = self.state[parameter]
            for inner, step, states in zip(inner_groups, saved["steps"], saved["matrices"], strict=True):
                inner["step"] = step
                self.inner.state.update(zip(inner["params"], states, strict=True))

    def _take_back(self, parameter: Tensor, inner_groups: Groups) -> None:
        state = self.inner.state
        self.state[parameter] = {
            "steps": [inner["step"] for inner in inner_groups],
            "matrices": [[state[matrix] for matrix in inner["params"]] for inner in inner_groups],
        }
        for inner in inner_groups:
            for matrix in inner["params"]:
                matrix.grad = None


def lr_factor(block: Matrix) -> float:
    """sqrt(fan_out / fan_in) relative to the base."""
    return math.sqrt(block.fan_out / block.base_fan_out * block.base_fan_in / block.fan_in)


def library() -> Any:
    """pytorch_optimizer, imported when it is needed."""
    return importlib.import_module("pytorch_optimizer")


@dataclass
class _LibraryRecipe(MatrixRecipe):
    """What both recipes check."""

    precondition_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("pytorch_optimizer") is None:
            raise ConfigError(
                f"optimizer {type(self).__name__} needs the package pytorch_optimizer, which is not installed. "
                "Type: pip install 'lit-reason[optimizers]'"
            )
        if self.precondition_every < 1:
            raise ConfigError(f"optimizer.precondition_every={self.precondition_every}: must be at least 1")


@dataclass
class SOAP(_LibraryRecipe):
    """A recipe: Adam in the eigenbasis of Shampoo's preconditioners; AdamW for embedding, head, norms and router.

    The matrices' first step only measures and moves nothing.

    Example::

        optimizer, scheduler = SOAP(lr=2**-8).build(model, total_steps=1000)

    Args:
        betas: of SOAP and of AdamW.
        precondition_every: steps between updates of the eigenbasis.
    """

    betas: tuple[float, float] = (0.95, 0.95)

    def matrix_optimizer(self, groups: Groups, layout: Layout) -> Optimizer:
        def make(inner: Groups) -> Optimizer:
            return library().SOAP(inner, betas=self.betas, precondition_frequency=self.precondition_every)

        return PerMatrix(groups, layout, make)


@dataclass
class Shampoo(_LibraryRecipe):
    """A recipe: L^-1/4 G R^-1/4 with L and R summed over all steps; AdamW for embedding, head, norms and router.

    As in the paper, without momentum or grafting: the package's momentum mixes a gradient with an update, and its
    grafting variant keeps objects in its state, which a safe checkpoint cannot hold.

    Example::

        optimizer, scheduler = Shampoo(lr=2**-3).build(model, total_steps=1000)

    Args:
        adamw_lr: the learning rate of what has no matrices, at the base width.
        precondition_every: steps between inverse roots; nothing moves before the first.
    """

    lr: float = 2**-3
    adamw_lr: float | None = 2**-8
    precondition_every: int = 1

    def matrix_optimizer(self, groups: Groups, layout: Layout) -> Optimizer:
        def make(inner: Groups) -> Optimizer:
            steps = self.precondition_every
            return library().Shampoo(inner, weight_decouple=True, preconditioning_compute_steps=steps)

        return PerMatrix(groups, layout, make)
