"""Models with low-rank adapters: what is adapted, the base without them, and the plain weights they fold into.

peft puts a layer of its own in the place of every adapted module, and the module inside it; a module with several
adapted parameters sits in as many:

    attn.kv_b                            peft's layer: lora_A, lora_B and, in DoRA, lora_magnitude_vector
    attn.kv_b.base_layer                 the linear map
    ffn.experts                          peft's layer for one of `gate_up` and `down`
    ffn.experts.base_layer               peft's layer for the other
    ffn.experts.base_layer.base_layer    the experts

Nothing here imports peft, which takes seconds: whoever only asks whether a model has adapters need not wait.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from lit_kernels.swap import take_all_off
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """peft's layers by name, an outer one before those inside it."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def adapters(model: nn.Module) -> bool:
    """Whether the model has any adapters."""
    return bool(adapted_layers(model))


def adapted_parameter(layer: nn.Module) -> tuple[nn.Module, str]:
    """The module inside peft's layer, and the name of its parameter that the layer adapts."""
    name = getattr(layer, "parameter_name", "weight")
    while hasattr(layer, "base_layer"):
        layer = layer.get_submodule("base_layer")
    return layer, name


def owner(name: str, layers: Collection[str]) -> str | None:
    """The one of `adapted_layers` whose adapter has a parameter of this name; None if it is the base's."""
    prefix, inside, _ = name.partition(".lora_")
    return prefix if inside and prefix in layers else None


def plain_name(name: str) -> str:
    """A parameter's name in the architecture without adapters.

    Example::

        >>> plain_name("blocks.0.attn.kv_b.base_layer.weight")
        'blocks.0.attn.kv_b.weight'
    """
    return ".".join(part for part in name.split(".") if part != "base_layer")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base model within the block, e.g. as the frozen reference, with no second copy of it.

    Trap: peft's own switch also freezes the adapters, and afterwards lets all of them train, whichever did before.
    """
    layers = list(adapted_layers(model).values())
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # type: ignore[assignment]
        yield model
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled  # type: ignore[assignment]


def merged_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers of the plain architecture, by its names, with the adapters folded in.

    What no adapter changes is the model's own tensor, not a copy: of a model without adapters, everything. The others
    are folded when they are asked for, and only the last one is kept, so that not all of them are in memory at once.
    """
    return _Merged(model)


class _Merged(Mapping[str, Tensor]):
    def __init__(self, model: nn.Module) -> None:
        layers = adapted_layers(model)
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._base = {plain_name(name): tensor for name, tensor in tensors if owner(name, layers) is None}
        on = {prefix: layer for prefix, layer in layers.items() if not layer.disable_adapters}
        self._layers = {plain_name(f"{prefix}.{adapted_parameter(layer)[1]}"): layer for prefix, layer in on.items()}
        self._last: tuple[str, Tensor] | None = None

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            return self._base[name]
        if self._last is None or self._last[0] != name:  # an expert's rows are asked for one after the other
            self._last = (name, _folded(self._layers[name], self._base[name]))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def merged_copy(model: Model) -> Model:
    """A copy of the plain architecture, no kernels swapped in, adapters folded in, all of it trainable again."""
    plain = copy.deepcopy(model)
    take_all_off(plain)
    layers = adapted_layers(plain)
    if not layers:
        return plain
    weights = merged_weights(plain)
    for prefix, layer in layers.items():
        if plain_name(prefix) == prefix:
            plain.set_submodule(prefix, adapted_parameter(layer)[0])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    for module in plain.modules():
        vars(module).pop("peft_config", None)
    return plain.requires_grad_(True)


def _folded(layer: nn.Module, weight: Tensor) -> Tensor:
    """W + scaling B A (2106.09685); DoRA gives each of its rows the learned norm (2402.09353 eq. 5)."""
    (name,) = cast(list[str], layer.active_adapters)
    folded = weight + cast(Callable[[str], Tensor], layer.get_delta_weight)(name)
    magnitudes = layer.get_submodule("lora_magnitude_vector")
    assert isinstance(magnitudes, nn.ModuleDict)
    if name in magnitudes:
        magnitude = magnitudes[name].get_parameter("weight")
        folded = folded * (magnitude / torch.linalg.vector_norm(folded, dim=1)).unsqueeze(1)
    return folded.to(weight.dtype)
