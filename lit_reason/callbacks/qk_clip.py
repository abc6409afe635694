"""Attention logits that grow without bound, which Muon makes likelier, are scaled back in the weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_reason.errors import ConfigError
from lit_reason.models.attention import Attend
from lit_reason.models.mla import MLA

SHARPNESS = 16.0


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, scale: float, attend: Attend) -> Tensor:
    """(H,) float32: each head's largest scale * q.k among the pairs that `attend` lets see each other.

    The scores themselves are nowhere stored, but the attention at SHARPNESS times the scale, with the keys as values,
    gives the mean key of nearly the largest logit: E[s] >= max s - log(keys) / SHARPNESS, half a nat too low at most
    for 3000 keys.

    Args:
        q, k: (*tokens, H, d).
    """
    nearest = attend(q, k, k, scale * SHARPNESS)
    logits = (q.float() * nearest.float()).sum(-1) * scale
    return logits.flatten(0, -2).amax(0)


@torch.no_grad()
def clip_heads(attention: MLA, factor_H: Tensor) -> None:
    """Multiplies each head's logits by its factor: the parts without rotation by its root on the query's and on the
    key's side, the rotary part on the query's side alone, because all heads share one rotary key (2507.20534, 2.1)."""
    last = attention.q if isinstance(attention.q, nn.Linear) else attention.q[-1]
    query = last.get_parameter("weight").unflatten(0, (attention.heads, -1))
    key = attention.kv_b.weight.unflatten(0, (attention.heads, -1))[:, : attention.nope]
    factor = factor_H.to(query.dtype)[:, None, None]
    query[:, : attention.nope].mul_(factor.sqrt())
    key.mul_(factor.sqrt())
    query[:, attention.nope :].mul_(factor)


class QKClip(Callback):
    """QK-clip of Kimi K2 (2507.20534) for multi-head latent attention: after an optimizer step, a head whose largest
    attention logit S was above `tau` gets its logits multiplied by tau / S.

    S is measured in the forward passes of every `every_n_steps`-th step, by one more attention without gradient, and
    over all ranks. Logs `attention/max_logit` and `attention/clipped_heads` in those steps.

    Args:
        tau: largest logit that is left alone (nats); 100 in the paper.
        every_n_steps: optimizer steps from one measurement to the next; 1 in the paper.

    Example::

        Trainer(callbacks=[QKClip()])

    YAML::

        qk_clip:
          _target_: lit_reason.callbacks.QKClip
    """

    def __init__(self, tau: float = 100.0, every_n_steps: int = 1) -> None:
        if not (tau > 0 and math.isfinite(tau)):
            raise ConfigError(f"QKClip got tau={tau}; valid: a number above 0, e.g. tau=100")
        if every_n_steps < 1:
            raise ConfigError(f"QKClip got every_n_steps={every_n_steps}; valid: a whole number of 1 or more")
        self.tau, self.every_n_steps = tau, every_n_steps
        self._logits: dict[MLA, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._measuring = False
        self._metrics: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = [m for m in pl_module.modules() if isinstance(m, MLA) and m.kv_b.weight.requires_grad]
        if not trained:
            rank_zero_warn(
                "QKClip found no lit_reason.models.mla.MLA with trainable weights and does nothing: drop this callback"
            )
        self._handles = [m.register_forward_pre_hook(self._watch) for m in trained]
        # In the step itself, so that no callback can save weights between the step and the clip.
        clip = partial(self._clip, trainer.strategy)
        self._handles += [optimizer.register_step_post_hook(clip) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._measuring = trainer.global_step % self.every_n_steps == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._measuring = False
        pl_module.log_dict(self._metrics)
        self._metrics = {}

    def _clip(self, strategy: Strategy, *_: Any) -> None:
        """After an optimizer step whose forward passes were measured."""
        if not self._logits:
            return
        clipped, largest = 0, []
        for attention, logits_H in self._logits.items():
            logits_H = strategy.reduce(logits_H, reduce_op="max")
            assert isinstance(logits_H, Tensor)
            factor_H = torch.where(logits_H > self.tau, self.tau / logits_H, 1.0)
            clip_heads(attention, factor_H)
            clipped += int((factor_H < 1).sum())
            largest.append(float(logits_H.max()))
        self._logits.clear()
        self._metrics = {"attention/max_logit": max(largest), "attention/clipped_heads": float(clipped)}

    def _watch(self, attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Puts a measuring attention in the place of the one that MLA was given."""
        assert isinstance(attention, MLA)
        if not (self._measuring and attention.training and torch.is_grad_enabled()):
            return None
        x, rotation, attend, *rest = args

        def watched(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            logits = max_logits(q, k, scale, attend)
            seen = self._logits.get(attention)
            self._logits[attention] = logits if seen is None else torch.maximum(seen, logits)
            return attend(q, k, v, scale)

        return (x, rotation, watched, *rest)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._measuring = [], False
        self._logits.clear()
