"""torch.compile for a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lit_kernels.swap import Swap
from torch import nn

from lit_reason.callbacks.swapping import Change, Swapping, chosen_layers, no_layers, patterns, swapped, without_cache


class Compiled(Swap):
    """Put on a layer; see `CompileModel`."""

    claim = "how it runs"
    outermost = True  # a checkpoint is a part of what is compiled: called again outside, it would not be

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(self, nn.Module)
        if self.training and torch.is_grad_enabled():
            kwargs = without_cache(kwargs)
        return self.swap_settings[Compiled]["run"](self, *args, **kwargs)  # type: ignore[index, operator]


def _plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """One function for all layers, so that they share what is compiled."""
    return super(Compiled, layer).forward(*args, **kwargs)  # type: ignore[misc, arg-type]


class CompileModel(Swapping):
    """Compiles each repeated layer, so that equal layers share one compilation, and state-dict keys stay what they
    are. The first steps take longer.

    Args:
        layers: shell patterns of module names; empty: the repeated layers.
        mode, dynamic, fullgraph: of `torch.compile`.

    Example::

        Trainer(callbacks=[CompileModel()])

    YAML::

        compile_model:
          _target_: lit_reason.callbacks.CompileModel
    """

    def __init__(
        self,
        layers: Sequence[str] = (),
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
    ) -> None:
        self.layers = patterns(type(self).__name__, "layers", layers)
        self.options: dict[str, Any] = {"mode": mode, "dynamic": dynamic, "fullgraph": fullgraph}

    def changes(self, model: nn.Module) -> Iterator[Change]:
        run = torch.compile(_plain, **self.options)
        for name, module in chosen_layers(model, self.layers):
            if module._compiled_call_impl is not None:
                yield Change(name, module, "it is compiled already")
            else:
                yield swapped(name, module, "compiled", Compiled, run=run)

    def missing(self) -> str:
        return no_layers(type(self).__name__, self.layers)
