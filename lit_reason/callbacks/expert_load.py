"""How evenly a mixture of experts is used."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer


def max_violation(load_E: Tensor) -> float:
    """max(load) / mean(load) - 1: 0 is a perfect balance, E / K - 1 is everything on the same experts."""
    load_E = load_E.double()
    return (load_E.max() / load_E.mean() - 1).item()


def load_counters(module: nn.Module) -> dict[str, Tensor]:
    """`{layer name: load_E}` of every submodule with a buffer of that name."""
    found = ((name.rpartition("."), buffer) for name, buffer in module.named_buffers())
    # A critic's experts are its own affair.
    return {layer: buffer for (layer, _, leaf), buffer in found if leaf == "load_E" and not layer.startswith("critic.")}


class ExpertLoad(Callback):
    """Logs `expert/max_violation` (worst layer) and `expert/dead` (experts without a token, all layers) per step.

    Reads the buffer `load_E` (assignments per expert since the last optimizer step) of any submodule that has one, just
    before the optimizer step, when all micro-batches are counted and nothing has been reset; sums it over the ranks.

    Args:
        per_layer: also log `expert/<layer>/max_violation`.

    Example::

        Trainer(callbacks=[ExpertLoad()])

    YAML::

        expert_load:
          _target_: lit_reason.callbacks.ExpertLoad
    """

    def __init__(self, per_layer: bool = False) -> None:
        self.per_layer = per_layer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not load_counters(pl_module):
            rank_zero_warn(
                "ExpertLoad found no submodule with a buffer named load_E and logs nothing: "
                "register_buffer('load_E', torch.zeros(experts)) and count assignments there, or drop this callback"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        counters = load_counters(pl_module)
        loads = {name: trainer.strategy.reduce(load_E.clone(), reduce_op="sum") for name, load_E in counters.items()}
        # nothing counted, e.g. a frozen layer: no statement about its balance
        loads = {name: load_E for name, load_E in loads.items() if load_E.sum() > 0}
        if not loads:
            return
        violations = {name: max_violation(load_E) for name, load_E in loads.items()}
        dead = torch.stack([(load_E == 0).sum() for load_E in loads.values()]).sum()
        pl_module.log("expert/max_violation", max(violations.values()))
        pl_module.log("expert/dead", dead.float())
        if self.per_layer:
            pl_module.log_dict({f"expert/{name}/max_violation": value for name, value in violations.items()})
