"""Coordinate check of muP inside a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lit_reason.models import Transformer
from lit_reason.models.coord import CoordinateProbe, by_kind


class MuPCoordCheck(Callback):
    """Logs how far the first optimizer steps move activations and what each matrix's updates do: `coord/change/<kind>`,
    rms(h_t - h_0), and `coord/update/<kind>`, rms((W_t - W_0) x_t). Under muP neither depends on the width: compare the
    runs of two widths (`scripts/coord_check.py` fits the slopes).

    Watches `pl_module.model` if there is one, else the LightningModule itself, on a part of the first training batch.
    Kinds are those of `lit_reason.models.coord`: the published matrices of a `Transformer`, and for every other
    `nn.Linear` or `nn.Embedding` its role. Training is not touched: same weights with and without this callback. A
    measurement costs one forward pass on the probe; one copy of the matrices is kept until the last of them. A resumed
    run measures nothing, for its start is gone. `check.measured[t]` keeps the metrics after t steps.

    Args:
        steps: optimizer steps to measure.
        max_tokens: of the probe, for a `Transformer`; another model is probed with the whole first call it gets.
        per_module: also log `coord/change/<kind>/<module>` and `coord/update/<kind>/<module>`.

    Example::

        Trainer(callbacks=[MuPCoordCheck(steps=10)])

    YAML::

        mup_coord_check:
          _target_: lit_reason.callbacks.MuPCoordCheck
          steps: 10
    """

    def __init__(self, steps: int = 10, max_tokens: int = 512, per_module: bool = False) -> None:
        self.steps, self.max_tokens, self.per_module = steps, max_tokens, per_module
        self._forward: Callable[[], Any] | None = None
        self._probe: CoordinateProbe | None = None
        self._handles: list[RemovableHandle] = []
        self._measured = 0
        self.measured: dict[int, dict[str, float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()
        self.measured.clear()
        self._measured = 0
        if trainer.global_step > 0 or self.steps < 1:
            return
        model = watched(pl_module)
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            rank_zero_warn("MuPCoordCheck needs whole parameters and logs nothing: use strategy=ddp or drop it")
            return
        self._handles.append(model.register_forward_pre_hook(self._catch_call, with_kwargs=True))
        if isinstance(model, Transformer):  # its modules call `hidden` or `packed`, which no hook sees
            self._handles.append(model.embed.register_forward_pre_hook(self._catch_ids(model)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._handles:
            return
        self._remove_hooks()
        if self._forward is None:
            rank_zero_warn(
                "MuPCoordCheck saw no call of the model and logs nothing: let training_step call self.model(...) or "
                "self(...), or drop this callback"
            )
            return
        with trainer.precision_plugin.forward_context():
            self._probe = CoordinateProbe(watched(pl_module), self._forward)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._probe is None or trainer.global_step == self._measured:
            return
        self._measured = trainer.global_step
        with trainer.precision_plugin.forward_context():
            found = self._probe.measure()
        metrics: dict[str, float] = {}
        for name, values in (("change", found.change), ("update", found.update)):
            logged = by_kind(values) | (values if self.per_module else {})
            metrics |= {f"coord/{name}/{key}": value for key, value in logged.items()}
        self.measured[self._measured] = metrics
        for logger in trainer.loggers:  # `self.log` would repeat the last values in all steps to come
            logger.log_metrics(metrics, step=self._measured - 1)
        if self._measured >= self.steps:
            self._clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._clear()

    def _catch_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._forward is None and not isinstance(model, Transformer):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
            self._forward = lambda: model(*args, **kwargs)

    def _catch_ids(self, model: Transformer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(embed: nn.Module, args: tuple[Any, ...]) -> None:
            if self._forward is None:
                ids_BT = probe_rows(args[0], min(model.config.max_seq_len, self.max_tokens), self.max_tokens)
                self._forward = lambda: model(ids_BT)

        return hook

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _clear(self) -> None:
        self._remove_hooks()
        self._forward = self._probe = None


def watched(pl_module: LightningModule) -> nn.Module:
    """The network of a LightningModule: its attribute `model`, else the module itself."""
    model = getattr(pl_module, "model", None)
    return model if isinstance(model, nn.Module) else pl_module


def probe_rows(ids: Tensor, max_length: int, max_tokens: int) -> Tensor:
    """Copies whole rows (cut to `max_length`) of token ids (B, T) or packed (N,), `max_tokens` in all."""
    ids_BT = (ids[None] if ids.dim() == 1 else ids)[:, :max_length]
    rows = max(1, max_tokens // ids_BT.shape[1])
    return torch.clone(ids_BT[:rows].detach())
