"""What every stage's LightningModule shares: the model, one optimizer by roles, router balancing, averaged metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_reason.errors import NonFiniteError
from lit_reason.models import HFModel, Transformer
from lit_reason.optim import OptimizerRecipe


class LanguageModule(L.LightningModule):
    """A language model with its optimizer.

    Args:
        model: the network; checkpoints hold its parameters and buffers.
        optimizer: recipe of the run's one optimizer.
        router_bias_rate: step of the auxiliary-loss-free balancing, once per optimizer step on the global load
            (2408.15664); 0 freezes the biases.
    """

    def __init__(self, model: Transformer | HFModel, optimizer: OptimizerRecipe, router_bias_rate: float) -> None:
        super().__init__()
        self.model = model
        self.optimizer_recipe = optimizer
        self.router_bias_rate = router_bias_rate
        self._meter = Meter()

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer, scheduler = self.optimizer_recipe.build(self.model, total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for router in self.model.routers():
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(router.load_E)
            router.update_bias(self.router_bias_rate)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.log("grad_norm", torch.nn.utils.get_total_norm(gradients))  # before clipping

    def log_step(
        self,
        batch_idx: int,
        means: Mapping[str, Tensor | float],
        weight: Tensor | float = 1.0,
        sums: Mapping[str, Tensor | float] | None = None,
    ) -> bool:
        """Logs once per optimizer step: `means` averaged by `weight` over its micro-batches, `sums` added up.

        Lightning alone would keep the last micro-batch's values. Returns whether this was the last micro-batch.
        """
        self._meter.add(means, sums or {}, float(weight))
        last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if last:
            self.log_dict(self._meter.take(), on_step=True, on_epoch=False, batch_size=1)
        return last

    def check_finite(self, loss: Tensor) -> None:
        """Raises NonFiniteError before the loss can reach a gradient."""
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"loss is {loss.item()} at step {self.trainer.global_step}; nothing of this step was applied or saved. "
                f"Lower optimizer.lr, or look at the data of this step"
            )


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run."""
    steps = int(trainer.estimated_stepping_batches)
    # Asking has loaded the dataloader, before Lightning 2.6.6 restored the loops; it would not load it again, so the
    # loader's saved state would be lost and a resumed run would start its data anew.
    trainer.fit_loop._combined_loader = None
    return steps


class Meter:
    """Weighted means and plain sums of metrics between two optimizer steps."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._weight = 0.0

    def add(self, means: Mapping[str, Tensor | float], sums: Mapping[str, Tensor | float], weight: float) -> None:
        self._weight += weight
        for name, value in means.items():
            # A micro-batch without tokens has no mean (NaN) and no weight.
            self._totals[name] = self._totals.get(name, 0.0) + (float(value) * weight if weight else 0.0)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def take(self) -> dict[str, float]:
        """What was gathered; the meter starts anew."""
        gathered = {name: total / max(self._weight, 1e-12) for name, total in self._totals.items()} | self._sums
        self.__init__()
        return gathered
