"""Stop before a NaN reaches the weights."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_reason.errors import NonFiniteError


class NonFiniteGuard(Callback):
    """Raises `NonFiniteError` on a NaN or infinite loss or gradient, before the optimizer step.

    The weights and every checkpoint therefore stay finite: resume from the last checkpoint. With fp16 loss scaling
    infinite gradients are normal, the scaler skips such a step: only the loss is checked there.

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
        if not grads:
            return
        # one device synchronisation for all parameters
        finite = torch.stack([grad.isfinite().all().to(pl_module.device) for _, grad in grads])
        if finite.all():
            return
        bad = [name for (name, _), ok in zip(grads, finite.tolist(), strict=True) if not ok]
        more = f" and {len(bad) - self.names} more" if len(bad) > self.names else ""
        raise NonFiniteError(
            f"the gradient is not finite at step {trainer.global_step} in {len(bad)} of {len(grads)} parameters: "
            f"{', '.join(bad[: self.names])}{more}; nothing was updated. Lower the learning rate or set "
            "trainer.gradient_clip_val=1.0, then resume from the last checkpoint"
        )
