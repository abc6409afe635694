"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) under muP, and MARS-M (2510.21800) on top of it.

    B <- mu B + (1 - mu) G          momentum of the gradient G
    U  = (1 - mu) G + mu B          Nesterov; B itself without
    W <- (1 - lr decay) W - lr sqrt(fan_out / fan_in) orthogonal(U)

A step of lr thus moves the output's RMS by about lr when the input's is 1, whatever the shape (2310.17813). Every
matrix of a parameter is orthogonalised by itself: each expert, head, gate and up projection (`mup.Matrices`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_reason.errors import ConfigError, nearest
from lit_reason.models.mup import Matrices
from lit_reason.optim.composite import Layout, MatrixRecipe, MatrixRule
from lit_reason.optim.recipe import check_above_zero, check_fraction

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at 0, so that small singular values grow fast (Jordan et al.)


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Every singular value to about 1 (0.7-1.2), singular vectors kept: x <- a x + (b x x' + c (x x')^2) x.

    Args:
        matrices: (*stack, out, in), left as they are; a matrix of zeros stays zero.
        steps: of the quintic iteration.
        dtype: of the products and the result.
    """
    a, b, c = COEFFICIENTS
    shape, tall = matrices.shape, matrices.shape[-2] > matrices.shape[-1]
    x = matrices.reshape(-1, *shape[-2:])
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x = (wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-7)).to(dtype)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


class MuonOptimizer(MatrixRule):
    """Muon on every matrix of its parameters.

    Example::

        whole = Matrices(1, (Matrix("matrix", 8, 4, 8, 4),))
        MuonOptimizer([{"params": [weight]}], {weight: whole}, lr=2**-5)

    Args:
        groups: parameter groups; `lr` and `weight_decay` are read from them in every step.
        layout: the matrices of every parameter.
        momentum: mu.
        ns_steps, ns_dtype: of `newton_schulz`.
        mars_gamma: MARS-M's gradient correction; 0 is plain Muon and keeps no last gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        layout: Layout,
        lr: float = 2**-5,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        mars_gamma: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(groups, defaults, layout)
        self.ns_steps, self.ns_dtype, self.mars_gamma = ns_steps, ns_dtype, mars_gamma

    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        direction = self._momentum(parameter, gradient, group["momentum"], group["nesterov"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        self._apply(parameter, direction, group["lr"])

    def _momentum(self, parameter: Tensor, gradient: Tensor, mu: float, nesterov: bool) -> Tensor:
        """U above; the momentum itself without Nesterov, so nobody may write to it."""
        state = self.state[parameter]
        if self.mars_gamma:
            gradient = self._corrected(gradient, state, mu, self.layout[parameter])
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - mu)
        return gradient.lerp(momentum, mu) if nesterov else momentum

    def _corrected(self, gradient: Tensor, state: dict[str, Any], mu: float, matrices: Matrices) -> Tensor:
        """c = g + gamma mu / (1 - mu) (g - last g), shortened to a norm of at most 1 per matrix (2510.21800)."""
        last = state.get("last_gradient", gradient)
        corrected = torch.add(gradient, gradient - last, alpha=self.mars_gamma * mu / (1 - mu))
        state["last_gradient"] = gradient.clone()  # the gradient's own memory is used again in the next step
        for view in matrices.split(corrected):
            view.div_(torch.linalg.matrix_norm(view, keepdim=True).clamp_min(1.0))
        return corrected

    def _apply(self, parameter: Tensor, update: Tensor, lr: float) -> None:
        matrices = self.layout[parameter]
        for block, weight, direction in zip(
            matrices.blocks, matrices.split(parameter), matrices.split(update), strict=True
        ):
            orthogonal = newton_schulz(direction, self.ns_steps, self.ns_dtype)
            weight.add_(orthogonal, alpha=-lr * math.sqrt(block.fan_out / block.fan_in))


@dataclass
class Muon(MatrixRecipe):
    """A recipe: Muon for matrices, AdamW for embedding, head, norms and router.

    Example::

        optimizer, scheduler = Muon(lr=2**-5, warmup_steps=20).build(model, total_steps=1000)

    Args:
        lr: of the matrices, the same at every width.
        adamw_lr: of the others, at the base width.
        weight_decay: matrices decay by lr * weight_decay per step, without the factor of their shape.
        momentum, nesterov: as above.
        ns_steps, ns_dtype: Newton-Schulz iterations, in "bfloat16" or "float32".
    """

    lr: float = 2**-5
    adamw_lr: float | None = 2**-8
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("momentum", self.momentum)
        if self.ns_steps < 1:
            raise ConfigError(f"optimizer.ns_steps={self.ns_steps}: must be at least 1")
        if self.ns_dtype not in DTYPES:
            raise ConfigError(f"optimizer.ns_dtype={self.ns_dtype!r}: {nearest(self.ns_dtype, DTYPES)}")

    def matrix_optimizer(self, groups: list[dict[str, Any]], layout: Layout) -> Optimizer:
        return self._muon(groups, layout, mars_gamma=0.0)

    def _muon(self, groups: list[dict[str, Any]], layout: Layout, mars_gamma: float) -> MuonOptimizer:
        return MuonOptimizer(
            groups,
            layout,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            ns_dtype=DTYPES[self.ns_dtype],
            mars_gamma=mars_gamma,
        )


@dataclass
class MarsM(Muon):
    """A recipe: Muon with MARS's variance reduction (2510.21800), at the price of a second buffer.

    Args:
        gamma: of the correction; 0.025 in the paper.
        nesterov: off, as in the paper.
        lr, adamw_lr, momentum, ...: as in `Muon`.
    """

    nesterov: bool = False
    gamma: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("gamma", self.gamma)

    def matrix_optimizer(self, groups: list[dict[str, Any]], layout: Layout) -> Optimizer:
        return self._muon(groups, layout, mars_gamma=self.gamma)
