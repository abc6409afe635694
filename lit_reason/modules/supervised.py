"""Next-token training: pretraining on plain text, and supervised priming on worked solutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.models import HFModel, Transformer
from lit_reason.modules.base import LanguageModule
from lit_reason.optim import OptimizerRecipe
from lit_reason.types import TokenBatch


class PretrainModule(LanguageModule):
    """Cross-entropy over every token that counts, plus the losses of multi-token prediction and of balance.

    Example::

        module = PretrainModule(Transformer(ModelConfig()), AdamW(lr=2**-7))
        Trainer(max_steps=1000).fit(module, TextData(...))

    Args:
        model, optimizer: what is trained, and how.
        router_bias_rate: see `LanguageModule`; DeepSeek-V3 trains with 1e-3.
    """

    def __init__(
        self, model: Transformer | HFModel, optimizer: OptimizerRecipe, router_bias_rate: float = 1e-3
    ) -> None:
        super().__init__(model, optimizer, router_bias_rate)

    def on_fit_start(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}: the token mean of supervised "
                "batches is per batch; type trainer.accumulate_grad_batches=1 and set the data's batch_size instead"
            )

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        cross_entropy, further, balance, correct = self._losses(batch)
        config = self.model.config
        loss = cross_entropy + config.mtp_loss * further + config.balance_loss * balance
        self.check_finite(loss)
        metrics = {"loss": loss.detach(), "token_accuracy": correct}
        if config.mtp_depth:
            metrics["mtp_loss"] = further.detach()
        if layers := len(self.model.routers()):
            metrics["balance_loss"] = balance.detach() / layers
        self.log_step(batch_idx, metrics)
        return loss

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        cross_entropy, _, _, correct = self._losses(batch)
        self.log_dict({"val/loss": cross_entropy, "val/token_accuracy": correct}, batch_size=len(batch), prog_bar=True)

    def _losses(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean cross-entropy (nats) of the next token and of those further on (2412.19437 eq. 24-25), balance loss and
        share of right argmaxes, over the tokens that count."""
        counts_BT = batch.mask_BT > 0
        valid_BT = real_tokens(counts_BT)
        hidden = self.model.hidden(batch.input_ids_BT, valid_BT=valid_BT)
        further = self.model.further(hidden, batch.target_ids_BT, valid_BT) if self.training else []
        balance = hidden.balance + sum(h.balance for h in further)
        losses = [
            self._cross_entropy(h.states_BTD[:, :-k], batch.target_ids_BT[:, k:], counts_BT[:, k:])
            for k, h in enumerate(further, start=1)
        ]
        further_loss = torch.stack(losses).mean() if losses else balance.new_zeros(())
        logits_NV = self.model.head(hidden.states_BTD[counts_BT]).float()
        targets_N = batch.target_ids_BT[counts_BT]
        correct = (logits_NV.detach().argmax(-1) == targets_N).float().mean()
        return F.cross_entropy(logits_NV, targets_N), further_loss, balance, correct

    def _cross_entropy(self, states_BTD: Tensor, target_ids_BT: Tensor, counts_BT: Tensor) -> Tensor:
        """Mean over the targets that count; 0 where none does."""
        logits_NV = self.model.head(states_BTD[counts_BT]).float()
        return F.cross_entropy(logits_NV, target_ids_BT[counts_BT], reduction="sum") / counts_BT.sum().clamp_min(1)


class SFTModule(PretrainModule):
    """The same loss on completions only: the data's mask leaves prompts out."""


def real_tokens(counts_BT: Tensor) -> Tensor:
    """bool (B, T): every position up to the last that counts; what follows is padding."""
    last_B = (counts_BT * torch.arange(1, counts_BT.shape[1] + 1, device=counts_BT.device)).amax(1)
    return torch.arange(counts_BT.shape[1], device=counts_BT.device) < last_B[:, None]
