"""Checkpoints after whole optimizer steps only, and after the last one.

Lightning 2.6.6's ModelCheckpoint forgets at a resume which step it saved last: resumed from step 25, it saves step 25
once more after the first micro-batch, and that micro-batch's gradient is in no checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Saves every n optimizer steps and after the last one, and keeps the newest.

    Never saves at the step a run resumed from, nor between two micro-batches of a step.

    Example::

        >>> from lit_reason.checkpoint import Checkpoint
        >>> callback = Checkpoint("runs/demo/checkpoints", every_n_train_steps=10)

    YAML::

        checkpoint:
          _target_: lit_reason.checkpoint.Checkpoint
          dirpath: ${run_dir}/checkpoints

    Args:
        dirpath: folder of the checkpoints; None takes `default_root_dir/checkpoints`.
        filename: without `.ckpt`; `{step}` becomes `step=25`.
        every_n_train_steps: in optimizer steps.
        monitor, mode: which checkpoints are worth keeping; by default the newest.
        save_top_k: how many are kept; -1 keeps all.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = "{step}",
        every_n_train_steps: int = 25,
        monitor: str = "step",
        mode: str = "max",
        save_top_k: int = 2,
    ) -> None:
        super().__init__(
            dirpath, filename, monitor, mode=mode, save_top_k=save_top_k, every_n_train_steps=every_n_train_steps
        )
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # Here and not in on_train_end: there Lightning has closed the epoch, which a longer run could not continue.
        last = trainer.global_step >= trainer.estimated_stepping_batches
        if last and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
