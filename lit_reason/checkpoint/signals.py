"""SIGTERM and Ctrl-C: finish the optimizer step, save, say so, leave with 128 + signal.

Lightning 2.6.6 alone leaves after the current *micro-batch* with exit code 0 and saves nothing
(`ModelCheckpoint(save_on_exception=True)` saves, but after any error too, a NaN loss for instance), and Ctrl-C stops
in the middle of a step.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

NAME = "interrupted.ckpt"
AT_ONCE = "stopped at once, nothing was saved; resume=auto continues from the newest checkpoint"


class SaveOnSignal(Callback):
    """A run that is told to stop leaves a checkpoint of its last finished step.

    The first SIGTERM or Ctrl-C lets the current optimizer step finish, then saves `interrupted.ckpt` and ends with
    exit code 143 or 130. A second Ctrl-C stops at once and saves nothing.

    Example::

        >>> from lit_reason.checkpoint import SaveOnSignal
        >>> callback = SaveOnSignal()

    YAML::

        save_on_signal:
          _target_: lit_reason.checkpoint.SaveOnSignal

    Args:
        dirpath: folder of `interrupted.ckpt`; None takes the ModelCheckpoint's, else `default_root_dir/checkpoints`.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received = None
        # Python allows handlers in the main thread only. Lightning installed its own just before this hook, and puts
        # back at its teardown every handler that it found before the fit, so there is nothing to undo here.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            for number in self._previous:
                signal.signal(number, self._on_signal)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between two micro-batches of a step the accumulated gradient would be lost: wait for the step.
        if trainer.global_step == self._step:
            return
        # A signal to any rank stops all of them, at the same step.
        received = self._received is not None
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        if not received:
            return
        self._received = self._received or signal.SIGTERM
        handler = self._previous.get(signal.SIGTERM)
        if not callable(handler):
            raise SIGTERMException
        # Lightning's own handler: it ends the loop after this batch's logging, with a SIGTERMException.
        handler(signal.SIGTERM, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._received is not None and isinstance(exception, KeyboardInterrupt):
            _say(AT_ONCE)
        if self._received is None or not isinstance(exception, SIGTERMException):
            return
        path = self._folder(trainer) / NAME
        exception.code = 128 + self._received
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except KeyboardInterrupt:
            _say(AT_ONCE)
            return
        if trainer.is_global_zero:
            _say(f"stopped by {signal.Signals(self._received).name} after step {trainer.global_step}, saved {path}")
            _say("the same command with resume=auto continues from there")

    def _folder(self, trainer: Trainer) -> Path:
        callback = trainer.checkpoint_callback
        folder = self.dirpath or getattr(callback, "dirpath", None)
        return Path(folder) if folder else Path(trainer.default_root_dir) / "checkpoints"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:
            again = " again" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            _say(f"{name}: saving after the current step; Ctrl-C{again} stops at once, without saving")
        self._received = number


def _say(message: str) -> None:
    # os.write: print and logging are not re-entrant, and a handler may run in the middle of either.
    os.write(2, f"\nlit_reason: {message}\n".encode())
