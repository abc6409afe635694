"""A record of every optimizer step, and at the end a picture and a page of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_reason.checkpoint.atomic import recording
from lit_reason.report import panel, write_report
from lit_reason.report.records import STEPS, append_row, begin_file, finite, read_rows
from lit_reason.types import RolloutGroup

log = logging.getLogger(__name__)


class Report(Callback):
    """Keeps `metrics/steps.jsonl`, and writes `report.png` and `report.html` when training ends or fails.

    One line per optimizer step with every scalar that was logged, whatever the logger. A resumed run drops the steps it
    will do again. With rollouts announced (`on_rollout`, which `PolicyModule` calls) the line also has
    `reward/<name>/se`, the standard error of the reward's mean clustered by prompt: the band in the picture.

    Args:
        dirpath: the run directory; None: the trainer's `default_root_dir`.
        title: of the report; None: the directory's name.
        show: print a panel with the result and the paths.

    Example::

        Trainer(callbacks=[Report()], log_every_n_steps=1)

    YAML::

        report:
          _target_: lit_reason.callbacks.Report
    """

    def __init__(self, dirpath: str | None = None, title: str | None = None, show: bool = True) -> None:
        self.dirpath, self.title, self.show = dirpath, title, show
        self._done = 0
        self._errors: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        return "lit_reason.Report"

    def state_dict(self) -> dict[str, Any]:
        # a run may resume in the middle of a round, whose rollouts are not announced again
        return {"errors": dict(self._errors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._errors = dict(state_dict["errors"])

    def folder(self, trainer: Trainer) -> Path:
        return Path(self.dirpath or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step
        path = self.folder(trainer) / STEPS
        if trainer.is_global_zero:
            with recording(path):
                begin_file(path, trainer.global_step)

    def on_rollout(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        groups: Sequence[RolloutGroup],
        advantages_B: Tensor,
        step: int,
    ) -> None:
        self._errors = standard_errors(groups)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or trainer.global_step == self._done:
            return
        self._done = trainer.global_step
        scalars = {k: v for k, v in trainer.callback_metrics.items() if not isinstance(v, Tensor) or v.numel() == 1}
        path = self.folder(trainer) / STEPS
        with recording(path):
            append_row(path, {"step": self._done - 1, **finite(scalars), **self._errors})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "Training finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer, pl_module, f"Training stopped ({type(exception).__name__})")

    def _write(self, trainer: Trainer, pl_module: LightningModule, heading: str) -> None:
        folder = self.folder(trainer)
        if not trainer.is_global_zero or not (folder / STEPS).exists():
            return
        try:
            records = read_rows(folder / STEPS)
            if not records:
                return
            files = write_report(folder, records=records, config=plain(pl_module.hparams), title=self.title)
        except (OSError, ValueError) as error:
            # a full disk or a damaged record must not turn the error that ended the training into another one
            log.warning("no report: %s", error)
            return
        if self.show:
            rich.print(panel(records, files, heading))


def standard_errors(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """`{"reward/<name>/se": ...}`: standard error of each reward's mean over prompts (ddof 1), faulty entries left out.

    Completions of one prompt are correlated: the prompt is the unit.
    """
    errors: dict[str, float] = {}
    for column, name in enumerate(groups[0].scores.names if groups else ()):
        means = torch.tensor([group.scores.values_BR[:, column].nanmean().item() for group in groups])
        means = means[means.isfinite()].double()
        if means.numel() > 1:
            errors[f"reward/{name}/se"] = (means.std() / math.sqrt(means.numel())).item()
    return errors


def plain(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as YAML can show them; whatever else they hold is shown as its text."""
    shown = {}
    for name, value in hparams.items():
        try:
            yaml.safe_dump(value)
        except yaml.YAMLError:
            value = str(value)
        shown[str(name)] = value
    return shown
