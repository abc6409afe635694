"""What every stage's LightningModule shares: the model, one optimizer by roles, router balancing, averaged metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_reason.errors import NonFiniteError
from lit_reason.models import HFModel, Transformer
from lit_reason.models.moe import Router
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
        optimizer, scheduler = self.optimizer_recipe.build(self.trained(), total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trained(self) -> nn.Module:
        """What the optimizer trains."""
        return self.model

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for router in (module for module in self.modules() if isinstance(module, Router)):
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(router.load_E)
            router.update_bias(self.router_bias_rate)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.trained().parameters() if p.grad is not None]
        self.log("grad_norm", torch.nn.utils.get_total_norm(gradients))  # before clipping

    def log_step(
        self,
        batch_idx: int,
        means: Mapping[str, Tensor | float],
        weight: Tensor | float = 1.0,
        sums: Mapping[str, Tensor | float] | None = None,
    ) -> dict[str, float] | None:
        """Logs once per optimizer step: `means` averaged by `weight` over its micro-batches and processes, `sums` added
        up; of a name that ends in `/max` the largest.

        Lightning alone would keep the last micro-batch's values. Returns what was logged, None before the last
        micro-batch.
        """
        self._meter.add(means, sums or {}, float(weight))
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return None
        measured = self._meter.take(self._reduce)
        self.log_dict(measured, on_step=True, on_epoch=False, batch_size=1)
        return measured

    def _reduce(self, values: list[float], how: str) -> list[float]:
        """Over all processes: "sum" or "max" of each."""
        if self.trainer.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.trainer.strategy.reduce(tensor, reduce_op=how).tolist()  # type: ignore[union-attr]

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
    """Weighted means and plain sums of metrics between two optimizer steps.

    Of a name that ends in `/max` the largest; what `FROM_MOMENTS` lists is made of several means, once they are over
    all tokens of the step.
    """

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._weight = 0.0

    def add(self, means: Mapping[str, Tensor | float], sums: Mapping[str, Tensor | float], weight: float) -> None:
        self._weight += weight
        for name, value in means.items():
            found = value.tolist() if isinstance(value, Tensor) else value
            parts: list[float] = found if isinstance(found, list) else [float(found)]
            if name.endswith("/max"):
                self._maxima[name] = max(self._maxima.get(name, -math.inf), *parts)
                continue
            # A micro-batch without tokens has no mean (NaN) and no weight.
            before = self._totals.get(name, [0.0] * len(parts))
            self._totals[name] = [t + (p * weight if weight else 0.0) for t, p in zip(before, parts, strict=True)]
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def take(self, reduce: Callable[[list[float], str], list[float]] = lambda values, how: values) -> dict[str, float]:
        """What was gathered; the meter starts anew.

        Args:
            reduce: (values, "sum" or "max") -> the same over all processes, which have the same names.
        """
        flat = [self._weight, *self._sums.values(), *(part for parts in self._totals.values() for part in parts)]
        added = iter(reduce(flat, "sum"))
        weight = next(added)
        sums = {name: next(added) for name in self._sums}
        totals = self._totals if weight else {}  # without a token nothing has a mean
        means = {name: [next(added) / weight for _ in parts] for name, parts in totals.items()}
        largest = reduce(list(self._maxima.values()), "max") if self._maxima else []
        single = {name: FROM_MOMENTS.get(name.split("/")[-1], _only)(*parts) for name, parts in means.items()}
        gathered = single | sums | dict(zip(self._maxima, largest, strict=True))
        self.__init__()
        return gathered


def _only(mean: float) -> float:
    return mean


def share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if whole else 0.0


def effective_sample_size(mean: float, square: float) -> float:
    """(mean w)^2 / mean w^2; 1 if there is no weight."""
    return mean * mean / square if square > 0 else 1.0


def explained_variance(mean: float, square: float, error: float, error_square: float) -> float:
    """1 - Var(e) / Var(R); 0 where R is constant up to rounding."""
    variance = square - mean * mean
    return 1 - (error_square - error * error) / variance if variance > 1e-12 * square else 0.0


FROM_MOMENTS: dict[str, Callable[..., float]] = {
    "ess": effective_sample_size,
    "explained_variance": explained_variance,
    "replayed": share,
}
