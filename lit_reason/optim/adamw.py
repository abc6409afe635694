"""AdamW (1711.05101) with muP's multipliers per role."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_reason.errors import ConfigError, nearest
from lit_reason.optim.groups import parameter_groups
from lit_reason.optim.schedules import SHAPES
from lit_reason.optim.schedules import schedule as make_schedule


class AdamW:
    """A recipe for the run's one optimizer: what it is built with, before there is a model.

    Example::

        optimizer, scheduler = AdamW(lr=2**-7, warmup_steps=20).build(model, total_steps=1000)

    Args:
        lr: learning rate at the base width; each role multiplies it (`lit_reason.models.mup`).
        betas, eps, weight_decay: as in AdamW, at the base width.
        schedule: `"constant"`, `"linear"` or `"cosine"`, after `warmup_steps` linear steps.
        final_fraction: what is left of the learning rate at the run's end.
    """

    def __init__(
        self,
        lr: float = 2**-8,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        schedule: str = "constant",
        warmup_steps: int = 0,
        final_fraction: float = 0.0,
    ) -> None:
        if not lr > 0:
            raise ConfigError(f"optimizer.lr={lr}: must be above 0")
        if schedule not in SHAPES:
            raise ConfigError(f"optimizer.schedule={schedule!r}: {nearest(schedule, SHAPES)}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, tuple(betas), eps, weight_decay
        self.schedule, self.warmup_steps, self.final_fraction = schedule, warmup_steps, final_fraction

    def build(self, model: nn.Module, total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimizer over `model`'s trainable parameters, and its schedule in optimizer steps."""
        groups = parameter_groups(model, lr=self.lr, weight_decay=self.weight_decay, eps=self.eps)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, foreach=True)  # type: ignore[arg-type]
        factor = make_schedule(
            self.schedule,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            final_fraction=self.final_fraction,
        )
        return optimizer, LambdaLR(optimizer, factor)
