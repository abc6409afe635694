"""What a checkpoint may hold: tensors and plain Python values, so that it loads without running any code.

`torch.load(weights_only=True)` refuses everything else, but only when the run is resumed, which is too late:
`check_plain` refuses it when it is saved, by name.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import Container, OmegaConf

from lit_reason.errors import CheckpointError

log = logging.getLogger(__name__)

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_LEFT_OUT = object()
HPARAMS = ("hyper_parameters", "datamodule_hyper_parameters")
# Lightning stores the *class* of OmegaConf hyper-parameters here; after `plain_hparams` they are a dict.
HPARAMS_TYPES = ("hparams_type", "datamodule_hparams_type")


def check_plain(value: Any, where: str = "checkpoint") -> None:
    """Raise a CheckpointError that names the first entry which is neither tensor nor plain Python value."""
    # Exact types: a subclass (IntEnum, a named tuple) is stored as a reference to its class.
    kind = type(value)
    if kind in SCALARS or isinstance(value, torch.Tensor):
        return
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            check_plain(key, f"key {key!r} of {where}")
            check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    else:
        raise CheckpointError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds tensors and plain Python values "
            "only (it is loaded with weights_only=True). Return x.item(), x.tolist(), str(x) or a tensor from the "
            "state_dict() that wrote it"
        )


def plain_hparams(value: Any, where: str, dropped: list[str]) -> Any:
    """Hyper-parameters as plain values; what cannot be one is left out and its name appended to `dropped`."""
    if isinstance(value, Container):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        kept = {str(k): plain_hparams(v, f"{where}[{k!r}]", dropped) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not _LEFT_OUT}
    if isinstance(value, (list, tuple)) and type(value) is not torch.Size:
        items = [plain_hparams(v, f"{where}[{i}]", dropped) for i, v in enumerate(value)]
        return [item for item in items if item is not _LEFT_OUT]
    if isinstance(value, Path):
        return str(value)
    if type(value) in SCALARS or isinstance(value, torch.Tensor):
        return value
    dropped.append(f"{where} ({type(value).__name__})")
    return _LEFT_OUT


def plain_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's checkpoint dict with plain hyper-parameters, checked from end to end."""
    plain = {k: v for k, v in checkpoint.items() if k not in HPARAMS_TYPES}
    dropped: list[str] = []
    for key in HPARAMS:
        if key in plain:
            plain[key] = plain_hparams(plain[key], key, dropped)
    if dropped:
        log.warning(
            "left out of the checkpoint, because they are objects: %s. Pass them again to load_from_checkpoint(), "
            "or name them in save_hyperparameters(ignore=[...])",
            ", ".join(dropped),
        )
    check_plain(plain)
    return plain
