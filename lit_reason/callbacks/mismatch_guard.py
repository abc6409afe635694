"""Say so, or stop, when the engine's probabilities leave the trainer's."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lit_reason.errors import ConfigError, RolloutError


class MismatchGuard(Callback):
    """Looks at `mismatch/kl`, KL(engine || trainer) per token, before every optimizer step.

    A third answer, to correct the loss, belongs to the objective:
    `'+algorithm.correction={name: truncate, level: token, high: 2.0, above: 0.01}'`.

    Args:
        warn: nats per token above which it warns, once; None never.
        stop: nats per token above which it raises RolloutError, before the step is applied; None never.

    Example::

        Trainer(callbacks=[MismatchGuard(stop=1.0)])

    YAML::

        mismatch_guard:
          _target_: lit_reason.callbacks.MismatchGuard
          stop: 1.0
    """

    def __init__(self, warn: float | None = 0.05, stop: float | None = None) -> None:
        for name, value in (("warn", warn), ("stop", stop)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value}: nats per token, above 0. Type callbacks.mismatch_guard.{name}=0.1")
        self.warn, self.stop = warn, stop
        self._warned = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        found = trainer.callback_metrics.get("mismatch/kl")
        if found is None:
            return
        kl = float(found)
        where = f"mismatch/kl is {kl:.3g} nats per token at step {trainer.global_step}"
        cause = "the engine holds other weights, or computes otherwise, than the trainer"
        if self.stop is not None and not kl <= self.stop:
            raise RolloutError(
                f"{where}, above stop={self.stop}: {cause}. Nothing of this step was applied. Look at the weight push, "
                "or type a larger callbacks.mismatch_guard.stop"
            )
        if self.warn is not None and kl > self.warn and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{where}, above warn={self.warn}: {cause}. It can be corrected for: "
                "'+algorithm.correction={name: truncate, level: token, high: 2.0}'"
            )
