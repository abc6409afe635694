"""Log-probs and entropies of a batch's tokens under the policy.

Shapes: B rows, T positions, M targets that count, V vocabulary, D width."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from lit_kernels.logprobs import linear_logprobs
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_reason.models import CausalLM
from lit_reason.modules.chunked import by_rows, row_chunk
from lit_reason.types import PolicyBatch


@runtime_checkable
class HasLogprobs(Protocol):
    """A head that goes from states to log-probs itself."""

    def logprobs(self, states_MD: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """`chosen_logprobs` of its logits."""
        ...


def token_logprobs(
    model: CausalLM, batch: PolicyBatch, temperature: float, experts_BTLK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy (nats) under `temperature`, both (B, T) float32, 0 where masked.

    A prompt that several rows share is computed once, and only positions that count reach the head. `experts_BTLK` are
    replayed; those of the batch are not unless they are given.
    """
    counts_BT = batch.mask_BT > 0
    states_MD = model.states_at(batch.input_ids_BT, counts_BT, experts_BTLK)
    logprob_M, entropy_M = head_logprobs(model.head, states_MD, batch.target_ids_BT[counts_BT], temperature)
    empty_BT = torch.zeros(counts_BT.shape, dtype=logprob_M.dtype, device=logprob_M.device)
    return empty_BT.masked_scatter(counts_BT, logprob_M), empty_BT.masked_scatter(counts_BT, entropy_M)


def head_logprobs(head: nn.Module, states_MD: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`chosen_logprobs` of the head's logits, which never exist for more than `chunked.LOGITS` elements at once.

    Where more are asked for, a bias-free linear layer's are made tile by tile, any other head's some rows at a time;
    the backward pass makes them again. A head that knows how (`FusedLogProb`) is asked for log-probs instead.
    """
    if isinstance(head, HasLogprobs) and _is_bare(head):
        return head.logprobs(states_MD, target_M, temperature)
    rows = row_chunk(head, states_MD)
    if rows < len(states_MD) and type(head) is nn.Linear and _is_bare(head):
        return linear_logprobs(states_MD, head.weight, target_M, temperature)

    def logprobs(states_MD: Tensor, target_M: Tensor) -> tuple[Tensor, Tensor]:
        return chosen_logprobs(head(states_MD), target_M, temperature)

    return by_rows(logprobs, rows, states_MD, target_M)  # type: ignore[return-value]


def _is_bare(head: nn.Module) -> bool:
    """Whether calling the head does no more than its class does with a weight: no bias, hook, adapter or replaced
    forward, and a weight that is no quantised or sharded tensor."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    plain = getattr(head, "bias", None) is None and type(getattr(head, "weight", None)) is nn.Parameter
    return plain and not any(hooks) and "forward" not in vars(head)


def chosen_logprobs(logits_MV: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[target] and the entropy of that distribution, (M,) float32 at least."""
    return _ChosenLogprobs.apply(logits_MV, target_M, temperature)  # type: ignore[return-value]


class _ChosenLogprobs(torch.autograd.Function):
    """One exponential a logit for both outputs and their gradient. With p = softmax(z), z = logits / temperature,
    H = -sum p log p:   d log p_y / dz = onehot(y) - p,   dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        z_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32), copy=True)
        z_MV.sub_(z_MV.amax(1, keepdim=True))
        if temperature != 1:
            z_MV.div_(temperature)
        p_MV = z_MV.exp()
        total_M1 = p_MV.sum(1, keepdim=True)
        p_MV, log_total_M1 = p_MV.div_(total_M1), total_M1.log()
        logprob_M = (z_MV.gather(1, target_M[:, None]) - log_total_M1).squeeze(1)
        entropy_M = log_total_M1.squeeze(1) - (p_MV * z_MV).sum(1)  # a dot product would run in autocast's bfloat16
        ctx.save_for_backward(p_MV, target_M, entropy_M)
        ctx.temperature, ctx.dtype = temperature, logits_MV.dtype
        ctx.set_materialize_grads(False)
        return logprob_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_M: Tensor | None, grad_entropy_M: Tensor | None) -> tuple[Tensor, None, None]:
        p_MV, target_M, entropy_M = ctx.saved_tensors
        if grad_logprob_M is None:
            grad_logprob_M = torch.zeros_like(entropy_M)
        grad_z_MV = p_MV * -grad_logprob_M[:, None]
        grad_z_MV.scatter_add_(1, target_M[:, None], grad_logprob_M[:, None])
        if grad_entropy_M is not None:
            # Where p underflowed to 0, log p is -inf and the product NaN; its limit is 0.
            surprise_MV = p_MV.log().add_(entropy_M[:, None]).clamp_min_(torch.finfo(p_MV.dtype).min)
            grad_z_MV -= grad_entropy_M[:, None] * p_MV * surprise_MV
        if ctx.temperature != 1:
            grad_z_MV.div_(ctx.temperature)
        return grad_z_MV.to(ctx.dtype), None, None
