"""What the callbacks share that put another forward on a model's modules: report, claims, undo, timing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lit_kernels.swap import Swap, put, take_off
from torch import nn

SHOWN = 4  # names of a report's line


@dataclass(slots=True)
class SwapReport:
    """What a callback did to a model, and what it left alone.

    Attributes:
        changed: {module's name: what it computes with now}.
        declined: {module's name: why it stays as it was}.
    """

    callback: str
    changed: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line per kind of change or reason, with the first names of each."""
        lines = [f"{self.callback}: {len(self.changed)} modules changed, {len(self.declined)} declined"]
        for word, found in (("changed", self.changed), ("declined", self.declined)):
            for what in dict.fromkeys(found.values()):
                names = [name for name, said in found.items() if said == what]
                more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
                lines.append(f"  {word}: {', '.join(names[:SHOWN])}{more}: {what}")
        return "\n".join(lines)


class Change(NamedTuple):
    """What becomes of one module; `make` does it and returns what undoes it, or is None where the module is declined
    (`what` says why)."""

    name: str
    what: str
    make: Callable[[], Callable[[], object]] | None = None


def swapped(name: str, module: nn.Module, what: str, swap: type[Swap], **settings: Any) -> Change:
    """The change that puts `swap` on a module."""

    def make() -> Callable[[], object]:
        put(module, swap, name, **settings)
        return partial(take_off, module, swap)

    return Change(name, what, make)


class Swapping(Callback):
    """Swaps in `setup`, before DDP wraps, FSDP2 shards or an optimizer is built; a model that is made later, in
    `configure_model`, is swapped when the fit starts. Every parameter stays the same object under the same name. The
    end of the fit, or an exception, undoes it.

    Without a Trainer: `report = callback.apply(model)` and `callback.undo()`.

    Attributes:
        report: of the last `apply`.
    """

    report: SwapReport | None = None
    _undo: Sequence[Callable[[], object]] = ()

    @abstractmethod
    def changes(self, model: nn.Module) -> Iterator[Change]:
        """What is to be changed, or is declined, in this model."""

    @abstractmethod
    def missing(self) -> str:
        """What was looked for and not found, and the fix."""

    def check(self, device: torch.device) -> None:
        """Refuses what cannot run there, before anything runs."""
        return

    def apply(self, *models: nn.Module) -> SwapReport:
        """Swaps in the models, all or nothing.

        Raises:
            ClaimedError: another callback has replaced the forward of a module that this one wants.
        """
        self.undo()
        report = self.report = SwapReport(type(self).__name__)
        done = self._undo = []
        try:
            for name, what, make in [change for model in models for change in self.changes(model)]:
                if make is None:
                    report.declined[name] = what
                else:
                    done.append(make())
                    report.changed[name] = what
        except BaseException:
            self.undo()
            raise
        return report

    def undo(self) -> None:
        """Every module as it was; one that FSDP2 has sharded since then stays swapped."""
        for undo in reversed(self._undo):
            undo()
        self._undo = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.check(trainer.strategy.root_device)
        self._apply_to(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._undo:
            return
        self._apply_to(pl_module)
        if not self._undo:
            rank_zero_warn(f"{self.report}\n{self.missing()}")

    def _apply_to(self, pl_module: LightningModule) -> None:
        """To the module and to what shall compute as it does beside it, such as a reference policy."""
        report = self.apply(pl_module, *getattr(pl_module, "computes_alike", tuple)())
        if self._undo:
            rank_zero_info(str(report))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.undo()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's dotted name, or its last part, fits one of the shell patterns."""
    return any(fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[2], p) for p in patterns)


def repeated_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model: the children of its outermost lists of two or more modules of one class."""
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = list(module.named_children())
        if len({type(child) for _, child in children}) == 1 and len(children) > 1:
            lists.append(name)
            yield from ((f"{name}.{child}", layer) for child, layer in children)


def chosen_layers(model: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose names fit, none inside another; without patterns the repeated layers."""
    if not patterns:
        yield from repeated_blocks(model)
        return
    taken: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in taken)
        if name and not inside and matches(name, patterns):
            taken.append(name)
            yield name, module


def no_layers(callback: str, patterns: Sequence[str]) -> str:
    looked = f"named {', '.join(patterns)}" if patterns else "in a list of two or more of one class"
    return f"{callback} found no layers {looked} and does nothing. Type {callback}(layers=['model.layers.*'])"
