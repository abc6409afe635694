"""The optional correction for an engine whose probabilities differ from the trainer's.

    B sequences   T tokens   rho = exp(old - rollout), the trainer's probability over the engine's

Every choice is a pure function `f(log_rho_BT, mask_BT, *, level, bounds) -> Correction(weights_BT, cut_BT)`. The
weights are detached and multiply the policy term alone, not the KL to a reference (RPG's KL is inside its policy term);
denominators count every token, rejected ones too.

| level     | rho of a token                                                                                |
|-----------|-----------------------------------------------------------------------------------------------|
| token     | its own                                                                                       |
| sequence  | the product over the sequence: unbiased, but 1% of drift per token over 4,000 tokens is e^40  |
| geometric | the geometric mean over the sequence                                                          |

A log-prob that the engine did not give (NaN) corrects nothing: rho = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.objectives.choices import check_value, resolve
from lit_reason.objectives.metrics import masked_mean, weight_moments
from lit_reason.objectives.ratio import safe_exp

Level = Literal["token", "sequence", "geometric"]


class Correction(NamedTuple):
    """A detached weight per token, and the tokens that were truncated or rejected."""

    weights_BT: Tensor
    cut_BT: Tensor


def truncate(log_rho_BT: Tensor, mask_BT: Tensor, *, level: Level, high: float) -> Correction:
    """TIS: w = min(rho, high) (Yao et al., "Your efficient RL framework secretly brings you off-policy RL", 2025).

    Trap: a token that the engine found far too likely (rho near 0) is not bounded, it vanishes by itself.
    """
    _check_bounds(0.0, high)
    rho_BT = _rho(log_rho_BT, mask_BT, level)
    return Correction(rho_BT.clamp(max=high), rho_BT > high)


def mask(log_rho_BT: Tensor, mask_BT: Tensor, *, level: Level, low: float | None, high: float) -> Correction:
    """MIS: w = rho where low <= rho <= high, else 0; at token level IcePop, with 0.5 and 5 (arXiv 2510.18855).

    Trap: rejected tokens stay in the denominators, so heavy rejection is a smaller step, not a cleaner one. Watch
    `correction/cut`.
    """
    _check_bounds(low or 0.0, high)
    rho_BT = _rho(log_rho_BT, mask_BT, level)
    cut_BT = (rho_BT > high) | (rho_BT < (0.0 if low is None else low))
    return Correction(rho_BT.masked_fill(cut_BT, 0), cut_BT)


def _check_bounds(low: float, high: float) -> None:
    if not low <= 1 <= high:
        raise ConfigError(
            f"correction: got low={low}, high={high}; valid: low <= 1 <= high, for equal probabilities are 1. "
            "Type '+algorithm.correction={name: truncate, level: token, high: 2.0}'"
        )


CORRECTIONS: dict[str, Callable[..., Correction]] = {"truncate": truncate, "mask": mask}


def resolve_correction(spec: Mapping[str, Any] | None) -> tuple[Callable[..., Correction] | None, float | None]:
    """The correction with its settings bound, and `above`: the mismatch KL (nats per token) from which it acts."""
    if spec is None:
        return None, None
    settings = dict(spec)
    above = settings.pop("above", None)
    check_value("correction.above", above, float | None)
    return resolve("correction", settings, CORRECTIONS), above


@torch.no_grad()
def log_ratio(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """old - rollout; 0 where masked and where the engine gave none."""
    difference_BT = old_logprobs_BT - rollout_logprobs_BT
    return difference_BT.masked_fill((mask_BT <= 0) | ~rollout_logprobs_BT.isfinite(), 0)


@torch.no_grad()
def correction_metrics(correction: Correction, on_BT: Tensor) -> dict[str, Tensor]:
    """`correction/cut`: share of tokens truncated or rejected; `correction/ess`: `weight_moments` of the weights."""
    return {
        "correction/ess": weight_moments(correction.weights_BT.log(), on_BT),
        "correction/cut": masked_mean(correction.cut_BT.float(), on_BT),
    }


@torch.no_grad()
def _rho(log_rho_BT: Tensor, mask_BT: Tensor, level: Level) -> Tensor:
    if level == "token":
        return safe_exp(log_rho_BT)
    sum_B1 = log_rho_BT.sum(dim=1, keepdim=True)
    length_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return safe_exp(sum_B1 if level == "sequence" else sum_B1 / length_B1).expand_as(log_rho_BT)
