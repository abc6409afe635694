"""The learning rate of each parameter role."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


def group_rates(optimizer: Optimizer) -> dict[str, float]:
    """`{group name: lr}`; a group without a name is `group0`, ...; groups of one name and one rate are one entry."""
    rates: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        name, rate = str(group.get("name", f"group{index}")), float(group["lr"])
        if rates.get(name, rate) != rate:
            name = f"{name}.{index}"
        rates[name] = rate
    return rates


class RoleLRMonitor(Callback):
    """Logs `lr/<role>` for every optimizer parameter group, by the group's `"name"`, as used in this step.

    Example::

        Trainer(callbacks=[RoleLRMonitor()])

    YAML::

        lr_per_role:
          _target_: lit_reason.callbacks.RoleLRMonitor
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        pl_module.log_dict({f"lr/{name}": rate for name, rate in group_rates(optimizer).items()})
