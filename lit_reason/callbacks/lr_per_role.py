"""The learning rate of each parameter role."""

from __future__ import annotations

import itertools

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


def group_rates(optimizer: Optimizer) -> dict[str, float]:
    """`{group name: lr}`; a group without a name is `group0`, the second group named `a` is `a.2`, ...

    Slashes and spaces in a name become `.` and `_`, so that each rate stays one `lr/<role>` in every logger. A name
    never depends on the rates: under a warm-up from 0 all rates start equal.
    """
    rates: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        role = str(group.get("name", f"group{index}")).replace("/", ".").replace(" ", "_")
        free = itertools.chain([role], (f"{role}.{n}" for n in itertools.count(2)))
        rates[next(name for name in free if name not in rates)] = float(group["lr"])
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
