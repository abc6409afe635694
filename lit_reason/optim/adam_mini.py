"""Adam-mini (2406.16793): Adam with one second moment per block of the Hessian instead of one per entry.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) mean over the block of g^2
    W <- (1 - lr decay) W - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

A block is a head of the queries or keys, and a row (an output neuron) of every other matrix. Our own
and not a library's: those find blocks by parameter names and take a stack of experts for one matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_reason.models.mup import Matrix, Role
from lit_reason.optim.composite import Layout, MatrixRecipe, MatrixRule

WHOLE = frozenset({"query", "key", "key_rope"})  # one block per head; rows elsewhere


class AdamMiniOptimizer(MatrixRule):
    """Adam-mini on the blocks of its parameters' matrices.

    Args:
        groups: parameter groups; `lr`, `eps` and `weight_decay` are read from them in every step.
        layout: the matrices of every parameter.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        layout: Layout,
        lr: float = 2**-8,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, layout)

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        matrices, state = self.layout[parameter], self.state[parameter]
        beta1, beta2 = group["betas"]
        squares = [_block_mean(b, g.square()) for b, g in zip(matrices.blocks, matrices.split(gradient), strict=True)]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter)}
            state["exp_avg_sq"] = [torch.zeros_like(square) for square in squares]
        state["step"] += 1
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        correction = math.sqrt(1 - beta2 ** state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        momenta, weights = matrices.split(state["exp_avg"]), matrices.split(parameter)
        for weight, momentum, moment, square in zip(weights, momenta, state["exp_avg_sq"], squares, strict=True):
            moment.lerp_(square, 1 - beta2)
            weight.addcdiv_(momentum, moment.sqrt().div_(correction).add_(group["eps"]), value=-step_size)


def _block_mean(block: Matrix, squared: Tensor) -> Tensor:
    """(*stack, repeats, 1 or fan_out, 1)."""
    return squared.mean(dim=(-2, -1) if block.name in WHOLE else -1, keepdim=True)


@dataclass
class AdamMini(MatrixRecipe):
    """A recipe: Adam-mini for matrices, AdamW for embedding, head, norms and router. Learning rates are AdamW's.

    Example::

        optimizer, scheduler = AdamMini(lr=2**-8).build(model, total_steps=1000)
    """

    def matrix_role(self, role: Role) -> Role:
        return role  # every entry moves by about lr, as in Adam: the same multipliers

    def matrix_optimizer(self, groups: list[dict[str, Any]], layout: Layout) -> Optimizer:
        return AdamMiniOptimizer(groups, layout, betas=self.betas)
