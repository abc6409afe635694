"""What a policy update is watched by: 0-d detached tensors, each the mean over one micro-batch's masked-in tokens, or
the largest (`.../max`), or the moments from which a whole step's figure is made (`.../ess`, `.../explained_variance`).

    B sequences   T tokens

Micro-batches hold different numbers of tokens: average over an optimizer step with `ObjectiveOutput.tokens` as weights.
(The quantiles are then means of the micro-batches' quantiles; all others are exact.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_reason.objectives.kl import k1, k3
from lit_reason.objectives.surrogate import Surrogate


@torch.no_grad()
def ratio_metrics(ratio_BT: Tensor, surrogate: Surrogate, on_BT: Tensor) -> dict[str, Tensor]:
    """`ratio/clip_low`, `ratio/clip_high`: fraction cut by the lower (A < 0) and the upper bound (A > 0).
    `ratio/q01`, `ratio/q99`: quantiles of the ratio; 1 in a micro-batch without tokens."""
    # NaN marks what is masked: no boolean indexing, so a GPU is not made to wait for a shape.
    marked_N = ratio_BT.detach().float().masked_fill(~on_BT, torch.nan).flatten()
    quantiles_2 = torch.nanquantile(marked_N, marked_N.new_tensor([0.01, 0.99]))
    quantiles_2 = torch.where(on_BT.any(), quantiles_2, torch.ones_like(quantiles_2))
    return {
        "ratio/clip_low": masked_mean(surrogate.low_BT.float(), on_BT),
        "ratio/clip_high": masked_mean(surrogate.high_BT.float(), on_BT),
        "ratio/q01": quantiles_2[0],
        "ratio/q99": quantiles_2[1],
    }


@torch.no_grad()
def kl_metrics(new_logprobs_BT: Tensor, ref_logprobs_BT: Tensor, on_BT: Tensor) -> dict[str, Tensor]:
    """`kl/k1`, `kl/k3`: KL(new || reference) in nats per token, estimated on the sampled tokens. k1 may be negative."""
    one_BT = torch.ones_like(new_logprobs_BT)
    return {
        "kl/k1": masked_mean(k1(new_logprobs_BT, ref_logprobs_BT, one_BT), on_BT),
        "kl/k3": masked_mean(k3(new_logprobs_BT, ref_logprobs_BT, one_BT), on_BT),
    }


@torch.no_grad()
def mismatch_metrics(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, on_BT: Tensor) -> dict[str, Tensor]:
    """How far the engine's log-probs are from the trainer's, over the tokens whose engine log-prob is finite.

    `mismatch/kl`: KL(engine || trainer) in nats per token (k3 on the engine's own samples); 0 if there is no token.
    `mismatch/max`: the largest |old - rollout| (nats).
    `mismatch/ess`: the two moments of rho = exp(old - rollout), see `weight_moments`.
    """
    on_BT = on_BT & rollout_logprobs_BT.isfinite()
    gap_BT = (old_logprobs_BT - rollout_logprobs_BT).masked_fill(~on_BT, 0)
    return {
        "mismatch/kl": masked_mean(k3(torch.zeros_like(gap_BT), gap_BT, torch.ones_like(gap_BT)), on_BT),
        "mismatch/max": gap_BT.abs().amax() if gap_BT.numel() else gap_BT.new_zeros(()),
        "mismatch/ess": weight_moments(gap_BT, on_BT),
    }


@torch.no_grad()
def weight_moments(log_weights_BT: Tensor, on_BT: Tensor) -> Tensor:
    """(mean w, mean w^2) over `on_BT`, float64. Averaged over all micro-batches they give the effective sample size
    (mean w)^2 / mean w^2 in 0..1: the share of the samples that the weights leave."""
    weights_BT = log_weights_BT.double().clamp(max=300).exp()  # sums of squares stay finite
    return torch.stack((masked_mean(weights_BT, on_BT), masked_mean(weights_BT.square(), on_BT)))


@torch.no_grad()
def critic_metrics(values_BT: Tensor, returns_BT: Tensor, loss_BT: Tensor, on_BT: Tensor) -> dict[str, Tensor]:
    """`critic/loss`, and of `critic/explained_variance` the moments (mean R, mean R^2, mean e, mean e^2), e = R - V:
    over all micro-batches 1 - Var(e) / Var(R), which is 1 for a perfect critic and 0 for a constant one."""
    returns_BT, error_BT = returns_BT.double(), (returns_BT - values_BT.detach()).double()
    moments = [masked_mean(x, on_BT) for x in (returns_BT, returns_BT.square(), error_BT, error_BT.square())]
    return {"critic/loss": masked_mean(loss_BT, on_BT), "critic/explained_variance": torch.stack(moments)}


def masked_mean(values_BT: Tensor, on_BT: Tensor) -> Tensor:
    """Mean over `on_BT` (bool), detached; 0 if it is empty. What is masked may be NaN."""
    return values_BT.detach().masked_fill(~on_BT, 0).sum() / on_BT.sum().clamp(min=1)
