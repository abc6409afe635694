"""Random number generators in the checkpoint: Lightning 2.6.6 saves none, so dropout differs after a resume."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

log = logging.getLogger(__name__)


def get_rng_state(device: torch.device | None = None) -> dict[str, Tensor]:
    """Every global generator of this process as tensors: torch's CPU and `device` (if CUDA), numpy's, python's."""
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = legacy
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device | None = None) -> None:
    """The inverse of `get_rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class RNGState(Callback):
    """Saves every rank's generators in the checkpoint and restores them before the first resumed batch.

    With an iterable that keeps its own cursor (`state_dict`, `load_state_dict`, `__len__`) a resumed run equals the
    uninterrupted one, dropout included. A plain shuffling DataLoader deals other batches: it has no cursor.

    Example::

        >>> from lit_reason.checkpoint import RNGState
        >>> callback = RNGState()

    YAML::

        rng_state:
          _target_: lit_reason.checkpoint.RNGState
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Tensor]] = []

    @property
    def state_key(self) -> str:
        return "lit_reason.RNGState"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Not in state_dict(): Lightning calls that on every rank but writes rank 0's, and it knows no trainer to
        # gather with.
        device = trainer.strategy.root_device
        mine = get_rng_state(device)
        if trainer.world_size == 1:
            ranks = [mine]
        else:
            gathered = {k: trainer.strategy.all_gather(v.to(device)).cpu() for k, v in mine.items()}
            ranks = [{k: v[rank].clone() for k, v in gathered.items()} for rank in range(trainer.world_size)]
        checkpoint["callbacks"][self.state_key] = {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The last hook before the first batch is drawn; seeding, the sanity check and iter(loader) lie before it.
        if not self._loaded:
            return
        ranks, self._loaded = self._loaded, []
        if trainer.global_rank >= len(ranks):
            log.warning(
                "rank %d: the checkpoint holds the generators of %d ranks; this rank starts with fresh ones, so the "
                "run continues but is not bit-identical",
                trainer.global_rank,
                len(ranks),
            )
            return
        set_rng_state(ranks[trainer.global_rank], trainer.strategy.root_device)
