"""Training on the text with a whole schedule, warm-up and decay, and the loss on text held out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_reason.models import Transformer
from lit_reason.optim import OptimizerRecipe

WARMUP, FINAL = 0.1, 0.05  # share of the steps; what is left of the rate at the end
VALIDATION_ROWS = 256  # that no run trains on


def whole_schedule(steps: int) -> dict[str, Any]:
    """Linear warm-up, linear decay: settings of a recipe."""
    return {"schedule": "linear", "warmup_steps": int(WARMUP * steps), "final_fraction": FINAL}


def train(
    model: Transformer,
    recipe: OptimizerRecipe,
    rows_NT: Tensor,
    *,
    steps: int,
    batch: int,
    seed: int,
    precision: str,
    alpha: float,
    bias_rate: float,
) -> Iterator[float]:
    """Yields each step's cross-entropy (nats) before its update, while `load_E` holds that batch's assignments.

    Args:
        rows_NT: text; the seed gives the order.
        alpha: of the balance loss.
        bias_rate: of the routers' biases; 0 freezes them.
    """
    optimizer, scheduler = recipe.build(model, steps)
    order = torch.randperm(len(rows_NT), generator=torch.Generator().manual_seed(seed)).to(rows_NT.device)
    for step in range(steps):
        items = torch.arange(step * batch, (step + 1) * batch, device=rows_NT.device) % len(order)
        cross_entropy, balance = language_loss(model, rows_NT[order[items]], precision)
        yield cross_entropy.item()
        optimizer.zero_grad()
        (cross_entropy + alpha * balance).backward()
        optimizer.step()
        scheduler.step()
        for router in model.routers():
            router.update_bias(bias_rate)


@torch.no_grad()
def validation_loss(model: Transformer, rows_NT: Tensor, batch: int, precision: str) -> float:
    """Mean cross-entropy of the next token (nats); leaves the model in eval mode."""
    model.eval()
    total = sum(language_loss(model, chunk, precision)[0].item() * len(chunk) for chunk in rows_NT.split(batch))
    return total / len(rows_NT)


def language_loss(model: Transformer, rows_BT: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(cross-entropy of the next token in nats, balance loss)."""
    with torch.autocast(rows_BT.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.hidden(rows_BT[:, :-1])
        logits_BTV = model.head(hidden.states_BTD)
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten()), hidden.balance
