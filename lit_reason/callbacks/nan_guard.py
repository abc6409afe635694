"""Stop before a NaN reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_reason.errors import NonFiniteError


class NonFiniteGuard(Callback):
    """Raises `NonFiniteError` on a NaN or infinite loss or gradient, before the optimizer step.

    A step can overflow by itself (a huge learning rate), so weights are checked once more before they are saved: no
    checkpoint holds a NaN. With fp16 loss scaling infinite gradients are normal, the scaler skips such a step: only
    the loss is checked there.

    Args:
        names: how many bad parameters the message names.

    Example::

        Trainer(callbacks=[NonFiniteGuard()])

    YAML::

        nan_guard:
          _target_: lit_reason.callbacks.NonFiniteGuard
    """

    def __init__(self, names: int = 5) -> None:
        self.names = names

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss).all():
            value = loss.detach().float().mean().item()
            raise NonFiniteError(
                f"the loss is {value} at step {trainer.global_step}; nothing was updated. "
                "Look at this step's rewards and log-probs; type trainer.detect_anomaly=true to find the operation"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.scaler is not None:
            return
        grads = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
        if bad := self._not_finite(grads):
            raise NonFiniteError(
                f"the gradient is not finite at step {trainer.global_step} in {bad}; nothing was updated. Lower the "
                "learning rate or set trainer.gradient_clip_val=1.0, and start again"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if bad := self._not_finite(list(pl_module.named_parameters())):
            raise NonFiniteError(
                f"the weights are not finite after step {trainer.global_step} in {bad}; they were not saved, earlier "
                "checkpoints are untouched. Lower the learning rate and start again"
            )

    def _not_finite(self, tensors: Sequence[tuple[str, Tensor]]) -> str:
        """`"3 of 40 parameters: a, b, c"`, or `""` when all are finite."""
        if not tensors:
            return ""
        # one device synchronisation for all parameters
        finite = torch.stack([value.detach().isfinite().all().to(tensors[0][1].device) for _, value in tensors])
        if finite.all():
            return ""
        bad = [name for (name, _), ok in zip(tensors, finite.tolist(), strict=True) if not ok]
        more = f" and {len(bad) - self.names} more" if len(bad) > self.names else ""
        return f"{len(bad)} of {len(tensors)} parameters: {', '.join(bad[: self.names])}{more}"
