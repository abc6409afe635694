"""Another forward for a module that stays the same object: same parameters, buffers, hooks, state-dict keys.

    put(layer, Faster)        type(layer): Linear -> FasterLinear(Faster, Linear)
    take_off(layer, Faster)   and back

So optimizers, DDP, FSDP2's `fully_shard` and whoever else holds the module notice nothing, and a deep copy is swapped
as its original is. It cannot be pickled, and a parametrisation that was there before cannot be removed, until the swap
is taken off. The new class comes first in the method resolution order: `super().forward` is what it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

from torch import nn


class Swap:
    """Base of what `put` puts before a module's class.

    Attributes:
        claim: what it replaces; a module has one swap of a claim at most.
        outermost: it stays the first in the order, whichever is put on later.
        settings: of the swap that `put` was given, by name.
    """

    claim: ClassVar[str] = "what it computes"
    outermost: ClassVar[bool] = False


class ClaimedError(ValueError):
    """Two swaps want to replace the same thing of one module."""


@cache
def _joined(swap: type[Swap], plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"{swap.__name__}{plain.__name__}", (swap, plain), {"_swap": swap, "_under": plain})


def swaps_of(module: nn.Module) -> Iterator[type[Swap]]:
    """The swaps that are put on a module, the newest first."""
    kind = type(module)
    while issubclass(kind, Swap):
        if "_swap" in vars(kind):
            yield kind._swap  # type: ignore[attr-defined]
            kind = kind._under  # type: ignore[attr-defined]
        else:  # somebody's class on top, e.g. FSDP2's
            kind = kind.__bases__[-1]


def put(module: nn.Module, swap: type[Swap], name: str = "", **settings: Any) -> None:
    """Puts `swap` on the module; its methods find `settings` in `self.swap_settings[swap]`.

    Raises:
        ClaimedError: another swap replaces the same already.
    """
    for other in swaps_of(module):
        if other.claim == swap.claim:
            raise ClaimedError(
                f"{name or type(module).__name__}: {swap.__name__} wants to replace {swap.claim}, which "
                f"{other.__name__} has replaced already. Drop one of the two, or keep this module out of one"
            )
    above = [other for other in swaps_of(module) if other.outermost and not swap.outermost]
    kept = {other: module.__dict__["swap_settings"][other] for other in above}
    for other in above:
        take_off(module, other)
    module.__class__ = _joined(swap, type(module))
    module.__dict__.setdefault("swap_settings", {})[swap] = settings
    for other in reversed(kept):
        put(module, other, name, **kept[other])


def take_off(module: nn.Module, swap: type[Swap]) -> bool:
    """Takes `swap` off again, whatever was put on after it. Returns whether it could: not if it is not there, nor
    while a class of somebody else, such as FSDP2's, lies on top."""
    above: list[type[Swap]] = []
    kind = type(module)
    while "_swap" in vars(kind):
        under: type[nn.Module] = kind._under  # type: ignore[attr-defined]
        if kind._swap is swap:  # type: ignore[attr-defined]
            for other in reversed(above):
                under = _joined(other, under)
            module.__class__ = under
            settings: dict[type[Swap], Any] = module.__dict__["swap_settings"]
            del settings[swap]
            if not settings:
                del module.__dict__["swap_settings"]
            return True
        above.append(kind._swap)  # type: ignore[attr-defined]
        kind = under
    return False


@contextmanager
def all_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before any swap, for a while: not while another thread computes with it."""
    swapped = [(module, type(module)) for module in model.modules() if "_swap" in vars(type(module))]
    try:
        for module, kind in swapped:
            while "_swap" in vars(kind):
                kind = kind._under  # type: ignore[attr-defined]
            module.__class__ = kind
        yield
    finally:
        for module, kind in swapped:
            module.__class__ = kind


def take_all_off(model: nn.Module) -> None:
    """The model as it was before any swap, e.g. a deep copy that is to be exported."""
    for module in model.modules():
        for swap in list(swaps_of(module)):
            take_off(module, swap)
