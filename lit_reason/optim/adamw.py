"""AdamW (1711.05101) with muP's multipliers per role."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lit_reason.optim.groups import parameter_groups
from lit_reason.optim.recipe import Recipe


@dataclass
class AdamW(Recipe):
    """A recipe for the run's one optimizer: what it is built with, before there is a model.

    Example::

        optimizer, scheduler = AdamW(lr=2**-7, warmup_steps=20).build(model, total_steps=1000)

    Args: those of `Recipe`.
    """

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, lr=self.lr, weight_decay=self.weight_decay, eps=self.eps)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, foreach=True)  # type: ignore[arg-type]
