"""What a policy update is watched by: 0-d detached tensors, each the mean over one micro-batch's masked-in tokens.

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
    """`mismatch/kl`: KL(engine || trainer) in nats per token (k3 on the engine's own samples), over the tokens whose
    engine log-prob is finite; 0 if there is none."""
    on_BT = on_BT & rollout_logprobs_BT.isfinite()
    return {
        "mismatch/kl": masked_mean(k3(rollout_logprobs_BT, old_logprobs_BT, torch.ones_like(old_logprobs_BT)), on_BT)
    }


def masked_mean(values_BT: Tensor, on_BT: Tensor) -> Tensor:
    """Mean over `on_BT` (bool), detached; 0 if it is empty. What is masked may be NaN."""
    return values_BT.detach().masked_fill(~on_BT, 0).sum() / on_BT.sum().clamp(min=1)
