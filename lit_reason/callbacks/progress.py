"""Progress inside generation, and training progress in plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

if TYPE_CHECKING:
    from lit_reason.rollout import Progress


def clock(seconds: float) -> str:
    """`3725` -> `"1:02:05"`, `65` -> `"1:05"`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def generation_line(progress: Progress) -> str:
    """`generating 96/256 samples  1,234 tokens/s  ETA 0:12`."""
    rate = progress.tokens / progress.seconds if progress.seconds > 0 else 0.0
    left = progress.seconds * (progress.total - progress.done) / progress.done if progress.done else None
    eta = "--:--" if left is None else clock(left)
    return f"generating {progress.done}/{progress.total} samples  {rate:,.0f} tokens/s  ETA {eta}"


class RolloutProgress(Callback):
    """Shows how far generation is: a second bar under Lightning's `RichProgressBar`, plain lines elsewhere.

    Whoever generates calls `on_generation_progress(trainer, pl_module, progress)` with the engine's `Progress` events.

    Args:
        every_seconds: at most one plain line in this time; a generation that is over sooner prints none.

    Example::

        Trainer(callbacks=[RolloutProgress()])

    YAML::

        rollout_progress:
          _target_: lit_reason.callbacks.RolloutProgress
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds = every_seconds
        self._printed = 0.0
        self._started: float | None = None
        self._task: tuple[Any, Any] | None = None

    def on_generation_progress(self, trainer: Trainer, pl_module: LightningModule, progress: Progress) -> None:
        if not trainer.is_global_zero:
            return
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
            self._show(bar, progress)
        elif bar is not None:
            self._print(bar, progress)

    def _show(self, bar: RichProgressBar, progress: Progress) -> None:
        rich = bar.progress
        assert rich is not None
        # RichProgressBar makes a new display now and then: a task belongs to one of them
        if self._task is None or self._task[0] is not rich:
            self._task = (rich, rich.add_task("Generating", total=progress.total))
        task = self._task[1]
        if progress.done < rich.tasks[rich.task_ids.index(task)].completed:
            rich.reset(task)
        rate = progress.tokens / progress.seconds if progress.seconds > 0 else 0.0
        rich.update(
            task,
            completed=progress.done,
            total=progress.total,
            description=f"Generating {rate:,.0f} tokens/s",
            visible=progress.done < progress.total,
        )
        bar.refresh()

    def _print(self, bar: ProgressBar, progress: Progress) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = self._printed = now
        if progress.done >= progress.total:
            self._started = None
        elif now - self._printed >= self.every_seconds:
            self._printed = now
            bar.print(generation_line(progress))


class PlainProgress(ProgressBar):
    """One line per optimizer step (or per N): step, loss, rewards, generation speed, time left. Replaces the bar.

    `step 12/200  loss 0.0312  answer 0.451  format 0.902  1,234 tokens/s  ETA 3:21`

    Args:
        every_n_steps: optimizer steps between lines; the first and the last step are always shown.

    Example::

        Trainer(callbacks=[PlainProgress()])

    YAML::

        progress_bar:
          _target_: lit_reason.callbacks.PlainProgress
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__()
        self.every_n_steps = max(1, every_n_steps)
        self._enabled = True
        self._begun = time.monotonic()
        self._first = self._last = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        # looked up when called: tests and notebooks replace sys.stdout
        print(*args, **{"flush": True, **kwargs})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.monotonic()
        self._first = self._last = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = trainer.global_step, int(min(trainer.estimated_stepping_batches, sys.maxsize))
        if not self._enabled or step == self._last:
            return
        due = step % self.every_n_steps == 0 or step == total or self._last == self._first
        self._last = step
        if due:
            elapsed = time.monotonic() - self._begun
            left = elapsed / (step - self._first) * (total - step) if total < sys.maxsize else None
            self.print(step_line(step, total if total < sys.maxsize else None, trainer.callback_metrics, left))


def step_line(step: int, total: int | None, metrics: dict[str, Any], left: float | None) -> str:
    """The line of one optimizer step from whatever of the known metrics is there."""
    values = {k: float(v) for k, v in metrics.items() if not isinstance(v, torch.Tensor) or v.numel() == 1}
    parts = [f"step {step}/{total}" if total else f"step {step}"]
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    rewards = [(k.split("/")[1], v) for k, v in values.items() if k.startswith("reward/") and k.endswith("/mean")]
    parts += [f"{name} {value:.3f}" for name, value in rewards]
    if "speed/generate_tokens_per_s" in values:
        parts.append(f"{values['speed/generate_tokens_per_s']:,.0f} tokens/s")
    if left is not None:
        parts.append(f"ETA {clock(left)}")
    return "  ".join(parts)


def progress_bar(every_n_steps: int = 1) -> ProgressBar:
    """Lightning's `RichProgressBar` on a terminal, `PlainProgress` elsewhere (a log file, CI, a notebook's pipe).

    Example::

        Trainer(callbacks=[progress_bar(), RolloutProgress()])

    YAML::

        progress_bar:
          _target_: lit_reason.callbacks.progress_bar
    """
    return RichProgressBar() if sys.stdout.isatty() else PlainProgress(every_n_steps)
