"""What the callbacks share that put another forward on a model's modules: report, claims, undo, timing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lit_kernels.dispatch import UnsupportedError
from lit_kernels.swap import Swap, put, take_off
from torch import nn

from lit_reason.errors import ConfigError

SHOWN = 4  # names of a report's line
HEADS = ("head", "lm_head")
CACHES = ("past_key_values", "past_key_value", "layer_past")


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
    module: nn.Module
    what: str
    make: Callable[[], Callable[[], object]] | None = None


def swapped(name: str, module: nn.Module, what: str, swap: type[Swap], **settings: Any) -> Change:
    """The change that puts `swap` on a module; declined where an object's own forward would hide it."""
    if "forward" in vars(module):
        return Change(name, module, "its forward was replaced on the object, which hides any class's")

    def make() -> Callable[[], object]:
        put(module, swap, name, **settings)
        return partial(take_off, module, swap)

    return Change(name, module, what, make)


class Swapping(Callback):
    """Swaps in `setup`, before DDP wraps, FSDP2 shards or an optimizer is built; what is made later, in
    `configure_model`, is swapped when the fit starts. Every parameter stays the same object under the same name. The
    end of the fit, or an exception, undoes it.

    Without a Trainer: `report = callback.apply(model)` and `callback.undo()`.

    Attributes:
        report: of what is swapped now, and was declined.
    """

    report: SwapReport | None = None
    _undo: Sequence[Callable[[], object]] = ()
    _seen: Collection[nn.Module] = ()

    @abstractmethod
    def changes(self, model: nn.Module) -> Iterator[Change]:
        """What is to be changed, or is declined, in this model."""

    @abstractmethod
    def missing(self) -> str:
        """What was looked for and not found, and the fix."""

    def check(self, device: torch.device) -> None:
        """Before anything runs.

        Raises:
            ConfigError: what is asked for cannot run there.
        """
        try:
            self.try_on(device)
        except UnsupportedError as error:
            raise ConfigError(f"{type(self).__name__}: {error}; on the command line kernels=NAME, e.g. torch") from None

    def try_on(self, device: torch.device) -> None:
        """Raises ConfigError or UnsupportedError for what cannot run there."""
        return

    def apply(self, *models: nn.Module) -> SwapReport:
        """Swaps in the models, all or nothing.

        Raises:
            ClaimedError: another callback has replaced the forward of a module that this one wants.
        """
        self.undo()
        self.report, self._undo, self._seen = SwapReport(type(self).__name__), [], set()
        return self._apply_more(*models)

    def _apply_more(self, *models: nn.Module) -> SwapReport:
        """In modules that were not looked at before; of several models all but the first are told by number."""
        report, seen = self.report, set(self._seen)
        assert report is not None
        try:
            for i, model in enumerate(models):
                for name, module, what, make in list(self.changes(model)):
                    told = f"{name} of model {i + 1}" if i else name
                    if module in seen:
                        continue
                    if make is None:
                        report.declined[told] = what
                    else:
                        self._undo = [*self._undo, make()]
                        report.changed[told] = what
                seen |= set(model.modules())
        except BaseException:
            self.undo()
            raise
        self._seen = seen
        return report

    def undo(self) -> None:
        """Every module as it was; one that FSDP2 has sharded since then stays swapped."""
        for undo in reversed(self._undo):
            undo()
        self._undo, self._seen = (), ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.check(trainer.strategy.root_device)
        if self.apply(*_computing(pl_module)).changed:
            rank_zero_info(str(self.report))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = len(self._undo)
        self._apply_more(*_computing(pl_module))
        if not self._undo:
            rank_zero_warn(f"{self.report}\n{self.missing()}")
        elif len(self._undo) > before:
            rank_zero_info(str(self.report))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.undo()


def _computing(pl_module: LightningModule) -> Sequence[nn.Module]:
    """The module, and what shall compute as it does beside it, such as a reference policy."""
    return pl_module, *getattr(pl_module, "computes_alike", tuple)()


def patterns(callback: str, key: str, value: Sequence[str]) -> tuple[str, ...]:
    """Shell patterns; ConfigError for a single text, whose letters would be taken for them."""
    if isinstance(value, str):
        raise ConfigError(f"{callback} got {key}={value!r}; valid: a list. Type {key}=[{value!r}]")
    return tuple(value)


def plain_forward(module: nn.Module) -> Any:
    """The forward under whatever swaps are on it."""
    return next(c.forward for c in type(module).__mro__ if "forward" in vars(c) and not issubclass(c, Swap))


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Linear layers of the shape of an embedding, with more outputs than inputs or named as heads are: not a square
    one, which the embedding of as many positions would have."""
    shapes = {m.weight.shape for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.shape in shapes
        and (module.out_features > module.in_features or matches(name, HEADS))
    }


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer of transformers in training without its cache of keys and values, which a second pass
    would extend, and whose state makes every layer another one to the compiler."""
    return {key: None if key in CACHES else value for key, value in kwargs.items()}


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
