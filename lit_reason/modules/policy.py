"""The policy update: log-probs -> objective -> metrics. Rollouts come as batches from `lit_reason.loop`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lit_reason.errors import CheckpointError, ConfigError
from lit_reason.loop import RolloutLoop, Round
from lit_reason.models import Transformer
from lit_reason.modules.base import LanguageModule
from lit_reason.modules.supervised import real_tokens
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.sync import checksum
from lit_reason.types import PolicyBatch

REFERENCE_KEY = "lit_reason/reference"


class PolicyModule(LanguageModule):
    """A policy and its frozen reference, trained by an objective.

    Example::

        policy = PolicyModule(model, AdamW(lr=2**-9), objective)
        Trainer(max_epochs=1).fit(policy, loop)

    Args:
        model: the policy; the reference is a frozen copy of it as it is now, in eval mode, not in the checkpoint
            (the checkpoint keeps its checksum and refuses another).
        optimizer: how the policy is trained.
        objective: one choice on each of the five axes.
        temperature: of sampling; log-probs are those of the tempered distribution.
        router_bias_rate: 0 (frozen) by default: reinforcement learning on a few prompts should not re-balance experts.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: AdamW,
        objective: Objective,
        temperature: float = 1.0,
        router_bias_rate: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer, router_bias_rate)
        self.objective, self.temperature = objective, temperature
        # In a tuple, so that it is not a submodule: not trained, not saved, not switched to train mode.
        self._reference = (copy.deepcopy(model).requires_grad_(False).eval(),)
        self._reference_checksum = checksum(model)
        self._round_metrics: dict[str, float] = {}

    @property
    def reference(self) -> Transformer:
        return self._reference[0]

    def on_fit_start(self) -> None:
        self.reference.to(self.device)
        if self.trainer.world_size > 1:
            raise ConfigError(f"trainer.devices: RL runs on one process for now, got {self.trainer.world_size}")
        loop = self.trainer.train_dataloader
        accumulate = self.trainer.accumulate_grad_batches
        if isinstance(loop, RolloutLoop) and loop.shape.micro_batches != accumulate:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulate} but the loop cuts an optimizer step into "
                f"{loop.shape.micro_batches} micro-batches: set both to the same number"
            )

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> Tensor:
        logprobs_BT, entropy_BT = token_logprobs(
            self.model, batch, self.temperature, entropy_grad=self.objective.needs_entropy
        )
        out = self.objective.loss(logprobs_BT, batch, entropy_BT)
        self.check_finite(out.loss)
        if self.log_step(batch_idx, out.metrics, weight=out.tokens, sums={"loss": out.loss.detach()}):
            self.log_dict(self._round_metrics, batch_size=1)
        return out.loss * self.trainer.accumulate_grad_batches  # Lightning divides by it; shares add up

    @torch.no_grad()
    def old_logprobs(self, batch: PolicyBatch) -> Tensor:
        """The policy's log-probs as they are now, by the same forward as training's."""
        with self.trainer.precision_plugin.forward_context():
            return token_logprobs(self.model, batch.to(self.device), self.temperature)[0].cpu()

    @torch.no_grad()
    def ref_logprobs(self, batch: PolicyBatch) -> Tensor:
        """The frozen reference's log-probs."""
        with self.trainer.precision_plugin.forward_context():
            return token_logprobs(self.reference, batch.to(self.device), self.temperature)[0].cpu()

    def on_round(self, finished: Round) -> None:
        """Keeps the round's metrics for its steps, and hands the round to every callback that wants it."""
        self._round_metrics = finished.metrics
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_rollout"):
                callback.on_rollout(
                    self.trainer, self, finished.groups, finished.advantages_B, self.trainer.global_step
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[REFERENCE_KEY] = {"sha256": self._reference_checksum, "rule": "frozen at the start of the run"}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint[REFERENCE_KEY]["sha256"]
        if saved != self._reference_checksum:
            raise CheckpointError(
                f"the checkpoint's reference policy is {saved[:12]}, this run's is {self._reference_checksum[:12]}: "
                "resume from the same initial weights, or start a new run (resume=never)"
            )


def token_logprobs(
    model: Transformer, batch: PolicyBatch, temperature: float, entropy_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy (nats) under `temperature`, both (B, T) float32, 0 where masked.

    Only positions that count reach the head, so no (B, T, V) tensor of prompts exists.
    """
    counts_BT = batch.mask_BT > 0
    states_BTD = model.hidden(batch.input_ids_BT, valid_BT=real_tokens(counts_BT)).states_BTD
    logprobs_NV = (model.head(states_BTD[counts_BT]).float() / temperature).log_softmax(-1)
    chosen_N = logprobs_NV.gather(1, batch.target_ids_BT[counts_BT][:, None]).squeeze(1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    empty_BT = torch.zeros(counts_BT.shape, device=chosen_N.device)
    return empty_BT.masked_scatter(counts_BT, chosen_N), empty_BT.masked_scatter(counts_BT, entropy_N)
