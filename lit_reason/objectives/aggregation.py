"""Axis 4, the aggregation: the weight W_it of each token in loss = sum_it W_it l_it.

    B sequences   T tokens   L_i masked-in tokens of sequence i

Every choice is a pure function `f(batch, *, settings) -> weights_BT`, 0 where masked. The denominators are
`batch.*_total`: they cover the whole *optimizer step* (all micro-batches, all ranks), so the micro-batches' losses
simply add up and a split changes no gradient. Averaging per-micro-batch token means instead is another objective.
A row without any token counts in `sequences_total` exactly if the caller counted it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lit_reason.types import PolicyBatch


def seq_mean_token_mean(batch: PolicyBatch) -> Tensor:
    """m / (B L_i): GRPO (arXiv 2402.03300), GSPO. Trap: a token of a long answer weighs less, so long wrong answers
    are punished less (Dr.GRPO's length bias)."""
    return batch.mask_BT / (_at_least_one(batch.sequences_total) * _at_least_one(batch.mask_BT.sum(dim=1))[:, None])


def token_mean(batch: PolicyBatch) -> Tensor:
    """m / N, N the tokens of the optimizer step: DAPO as released (arXiv 2503.14476). Trap: N of the micro-batch is
    wrong, and silently so."""
    return batch.mask_BT / _at_least_one(batch.tokens_total)


def prompt_mean_token_mean(batch: PolicyBatch) -> Tensor:
    """m / (P N_group): DAPO's eq. 8 read literally (arXiv 2503.14476). Trap: N_group is over the *whole* group, also
    when the micro-batch holds a part of it."""
    return batch.mask_BT / (_at_least_one(batch.prompts_total) * _at_least_one(batch.group_tokens_B)[:, None])


def seq_mean_token_sum(batch: PolicyBatch) -> Tensor:
    """m / B: REINFORCE, RLOO; Dr.GRPO as printed (arXiv 2503.20783). Trap: the gradient grows with the length, so the
    learning rate depends on it."""
    return batch.mask_BT / _at_least_one(batch.sequences_total)


def token_sum_norm(batch: PolicyBatch) -> Tensor:
    """m / (B L_max): Dr.GRPO as implemented (arXiv 2503.20783). Trap: L_max is the constant generation limit, never
    the padded width of a batch."""
    return batch.mask_BT / (_at_least_one(batch.sequences_total) * batch.max_completion)


def token_sum_over_max(batch: PolicyBatch) -> Tensor:
    """m / L_max, verl's `seq-mean-token-sum-norm` until January 2026. Trap: without 1/B the gradient grows with the
    batch; for results of that time only, `token_sum_norm` is Dr.GRPO's."""
    return batch.mask_BT / batch.max_completion


def token_sum(batch: PolicyBatch) -> Tensor:
    """m. Trap: the gradient grows with the batch size; the learning rate must shrink with it."""
    return batch.mask_BT


AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "seq_mean_token_mean": seq_mean_token_mean,
    "token_mean": token_mean,
    "prompt_mean_token_mean": prompt_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "token_sum_norm": token_sum_norm,
    "token_sum_over_max": token_sum_over_max,
    "token_sum": token_sum,
}


def _at_least_one(count: Tensor) -> Tensor:
    # Only an empty row or batch has 0, and its numerator is 0 too: 0 / 1 instead of NaN.
    return count.clamp(min=1)
