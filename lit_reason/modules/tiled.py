"""Log-probs and entropies straight from states and the head's weight: the logits exist one tile at a time.

Shapes: M targets, V vocabulary, D width; a tile is R of the M rows by C of the V columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_reason.models.layers import compute_dtype

# On a CPU a float32 tile stays in the last-level cache between its passes; an accelerator wants few, large products.
TILE = {"cpu": (1024, 2048)}
LARGE_TILE = (4096, 8192)


def tiled_logprobs(states_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(states @ weight.T / temperature)[target] and that distribution's entropy (nats), (M,) float32 at
    least. First derivatives only.

    Products run in autocast's dtype if it is on, and give logits of that dtype, as `nn.Linear` would; everything
    after is float32 at least. Columns are the outer loop, so that a row of the weight's gradient is summed in float32
    and rounded once. The gradient of the states is summed in float32 over the column tiles.

    Trap: a target outside 0 .. V-1 gives NaN, where the indexing of whole logits would raise.
    """
    return _TiledLogprobs.apply(states_MD, weight_VD, target_M, temperature)  # type: ignore[return-value]


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _tile(device: torch.device) -> tuple[int, int]:
    return TILE.get(device.type, LARGE_TILE)


def _logits(states_RD: Tensor, weight_CD: Tensor, temperature: float) -> Tensor:
    """One tile of logits / temperature, float32 at least."""
    logits_RC = states_RD @ weight_CD.T
    z_RC = logits_RC.to(torch.promote_types(logits_RC.dtype, torch.float32))
    return z_RC if temperature == 1 else z_RC.div_(temperature)


def _place(target_R: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each target lies in the tile (any place if it does not), (R, 1), and whether it does, (R,)."""
    inside_R = (target_R >= columns.start) & (target_R < columns.stop)
    return (target_R - columns.start).clamp(0, columns.stop - columns.start - 1)[:, None], inside_R


class _TiledLogprobs(torch.autograd.Function):
    """Forward: the online softmax (1805.02867) of each row over the column tiles. With z = logits / temperature, m the
    largest z so far, s = sum exp(z - m) and t = sum exp(z - m) (z - m), the log-normaliser is m + log s and the entropy
    log s - t / s. Where m rises by d, both sums shrink by exp(-d), and t loses d times the shrunken s.

    Backward: each tile is computed again.   d log p_y / dz = onehot(y) - p,   dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, states_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(states_MD)
        wide = {"dtype": torch.promote_types(dtype, torch.float32), "device": states_MD.device}
        (R, C), (M, V) = _tile(states_MD.device), (len(states_MD), len(weight_VD))
        top_M = torch.full((M,), torch.finfo(wide["dtype"]).min / 4, **wide)  # finite: 0 times -infinity is NaN
        s_M, t_M, chosen_M = torch.zeros(M, **wide), torch.zeros(M, **wide), torch.full((M,), torch.nan, **wide)
        x_MD = states_MD.to(dtype)
        for columns in _spans(V, C):
            weight_CD = weight_VD[columns].to(dtype)
            for rows in _spans(M, R):
                z_RC = _logits(x_MD[rows], weight_CD, temperature)
                place_R1, inside_R = _place(target_M[rows], columns)
                chosen_M[rows] = torch.where(inside_R, z_RC.gather(1, place_R1).squeeze(1), chosen_M[rows])
                top_R = torch.maximum(top_M[rows], z_RC.amax(1))
                fall_R = top_M[rows] - top_R
                p_RC = z_RC.sub_(top_R[:, None]).exp()
                shrunken_R = s_M[rows] * fall_R.exp()
                t_M[rows] = t_M[rows] * fall_R.exp() + fall_R * shrunken_R + (p_RC * z_RC).sum(1)
                s_M[rows] = shrunken_R + p_RC.sum(1)
                top_M[rows] = top_R
        log_s_M = s_M.log()
        logprob_M, entropy_M = chosen_M - top_M - log_s_M, log_s_M - t_M / s_M
        ctx.save_for_backward(states_MD, weight_VD, target_M, top_M + log_s_M, entropy_M)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.set_materialize_grads(False)
        return logprob_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob_M: Tensor | None, grad_entropy_M: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        states_MD, weight_VD, target_M, normaliser_M, entropy_M = ctx.saved_tensors
        if grad_logprob_M is None:
            grad_logprob_M = torch.zeros_like(entropy_M)
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        (R, C), (M, V) = _tile(states_MD.device), (len(states_MD), len(weight_VD))
        x_MD = states_MD.to(ctx.dtype)
        grad_states_MD = torch.zeros_like(states_MD, dtype=entropy_M.dtype) if needs_states else None
        grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
        with torch.autocast(states_MD.device.type, enabled=False):
            for columns in _spans(V, C):
                weight_CD = weight_VD[columns].to(ctx.dtype)
                sum_CD = None
                for rows in _spans(M, R):
                    log_p_RC = _logits(x_MD[rows], weight_CD, ctx.temperature).sub_(normaliser_M[rows, None])
                    grad_R1 = grad_logprob_M[rows, None]
                    grad_z_RC = log_p_RC.exp()
                    if grad_entropy_M is None:
                        grad_z_RC.mul_(-grad_R1)
                    else:
                        surprise_RC = log_p_RC.add_(entropy_M[rows, None])
                        grad_z_RC.mul_(surprise_RC.mul_(-grad_entropy_M[rows, None]).sub_(grad_R1))
                    place_R1, inside_R = _place(target_M[rows], columns)
                    grad_z_RC.scatter_add_(1, place_R1, grad_R1 * inside_R[:, None])
                    if ctx.temperature != 1:
                        grad_z_RC.div_(ctx.temperature)
                    grad_z_RC = grad_z_RC.to(ctx.dtype)
                    if grad_states_MD is not None:
                        grad_states_MD[rows] += grad_z_RC @ weight_CD
                    if grad_weight_VD is not None:
                        part_CD = grad_z_RC.T @ x_MD[rows]
                        sum_CD = part_CD.to(entropy_M.dtype) if sum_CD is None else sum_CD.add_(part_CD)
                if grad_weight_VD is not None:
                    assert sum_CD is not None
                    grad_weight_VD[columns] = sum_CD
        grad_states = None if grad_states_MD is None else grad_states_MD.to(states_MD.dtype)
        return grad_states, grad_weight_VD, None, None
