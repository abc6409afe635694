"""What a run's configuration says of its optimizer before there is a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_reason.errors import ConfigError, nearest
from lit_reason.optim.schedules import SHAPES
from lit_reason.optim.schedules import schedule as make_schedule


class OptimizerRecipe(Protocol):
    """What a LightningModule of ours takes as its optimizer; a class of your own needs this one method."""

    def build(self, model: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]: ...


@dataclass
class Recipe(ABC):
    """The run's one optimizer with a schedule that multiplies every group's own learning rate.

    Args:
        lr: learning rate at the base width; each role multiplies it (`lit_reason.models.mup`).
        betas, eps, weight_decay: as in AdamW, at the base width.
        schedule: `"constant"`, `"linear"` or `"cosine"`, after `warmup_steps` linear steps.
        final_fraction: what is left of the learning rate at the run's end.
    """

    lr: float = 2**-8
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_above_zero("lr", self.lr)
        if self.schedule not in SHAPES:
            raise ConfigError(f"optimizer.schedule={self.schedule!r}: {nearest(self.schedule, SHAPES)}")
        first, second = self.betas
        self.betas = (first, second)  # YAML gives a list

    def build(self, model: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer over `model`'s trainable parameters, and its schedule in optimizer steps."""
        factor = make_schedule(
            self.schedule,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            final_fraction=self.final_fraction,
        )
        optimizer = self.optimizer(model)
        return optimizer, LambdaLR(optimizer, factor)

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over `model`'s trainable parameters."""


def check_above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"optimizer.{name}={value}: must be above 0")


def check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"optimizer.{name}={value}: must be at least 0 and below 1")
