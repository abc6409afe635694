"""log p(target) and entropy of a linear head's distribution, straight from states and weight: no (M, V) tensor exists.

    torch      logits tile by tile, the products by the library
    triton     forward in one kernel; backward by chunks of the vocabulary: a kernel makes the logits' gradient again,
               the library multiplies

Both are the online softmax (1805.02867). With z = logits / temperature, m the largest z so far, s = sum exp(z - m) and
t = sum exp(z - m) (z - m), the log-normaliser is m + log s and the entropy log s - t / s. Where m rises by d, both
sums shrink by exp(-d), and t loses d times the shrunken s. Since m >= z[target] and s >= exp(m - m) = 1, rounded or
not, no log-prob is positive.

    d log p_y / dz = onehot(y) - p        dH / dz = -p (log p + H)

Name and shape for `dispatch`: "linear_logprobs", (M, V, D).

Shapes: M targets, V vocabulary, D width; a tile is R of the M rows by C of the V columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_kernels.dispatch import UnsupportedError, choose

# On a CPU a float32 tile stays in the last-level cache between its passes; an accelerator wants few, large products.
TILE = {"cpu": (1024, 2048)}
LARGE_TILE = (4096, 8192)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of products in Triton


def linear_logprobs_reference(
    states_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same from logits in full, float32 at least after the product; a target outside 0 .. V-1 raises."""
    logits_MV = F.linear(states_MD, weight_VD)
    z_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)) / temperature
    logp_MV = z_MV.log_softmax(-1)
    return logp_MV.gather(1, target_M[:, None]).squeeze(1), -(logp_MV.exp() * logp_MV).sum(-1)


def linear_logprobs(
    states_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float = 1.0, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """log softmax(states @ weight.T / temperature)[target] and that distribution's entropy (nats), (M,) float32 at
    least. First derivatives only.

    Products run in autocast's dtype if it is on. Everything after is float32 at least; between the two, torch rounds
    logits to the products' dtype, as `nn.Linear` would, and Triton does not. A row of the weight's gradient is summed
    in float32 and rounded once; the gradient of the states is summed in float32 over parts of the vocabulary.

    Trap: a target outside 0 .. V-1 gives NaN, where the indexing of whole logits would raise.

    Args:
        target_M: int64.

    Raises:
        UnsupportedError: Triton was asked for where it cannot run, or for products of float64.
        ValueError: the shapes do not fit, or there is no such backend.

    Example::

        logprob_M, entropy_M = linear_logprobs(states_MD, head.weight, target_M, temperature=0.7)
    """
    (M, D), V = _checked(states_MD, weight_VD, target_M), len(weight_VD)
    dtype = _compute_dtype(states_MD)
    wanted = "torch" if backend == "auto" and dtype not in DTYPES else backend
    if choose("linear_logprobs", wanted, states_MD.device, (M, V, D)).backend == "torch":
        return _TiledLogprobs.apply(states_MD, weight_VD, target_M, temperature)  # type: ignore[return-value]
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"linear_logprobs got products of {dtype}; valid for Triton: {', '.join(map(str, DTYPES))}. "
            "Type backend='torch'"
        )
    return _linear_logprobs(states_MD, weight_VD, target_M, temperature, dtype)[:2]


def _checked(states_MD: Tensor, weight_VD: Tensor, target_M: Tensor) -> tuple[int, int]:
    shapes = [tuple(x.shape) for x in (states_MD, weight_VD, target_M)]
    two = states_MD.dim() == weight_VD.dim() == 2
    if not two or states_MD.shape[1] != weight_VD.shape[1] or target_M.shape != states_MD.shape[:1]:
        raise ValueError(
            f"got states {shapes[0]}, weight {shapes[1]}, targets {shapes[2]}; valid: (M, D), (V, D), (M,)"
        )
    if not len(weight_VD):
        raise ValueError(f"got a weight {shapes[1]}; valid: (V, D), at least one row")
    return shapes[0]  # type: ignore[return-value]


def _compute_dtype(x: Tensor) -> torch.dtype:
    """In which products of `x` run."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


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
    """Columns are the outer loop, so that a row of the weight's gradient is summed before it is rounded. In the
    backward pass each tile is computed again."""

    @staticmethod
    def forward(
        ctx: Any, states_MD: Tensor, weight_VD: Tensor, target_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(states_MD)
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
                    grad_weight_VD[columns] = 0 if sum_CD is None else sum_CD
        grad_states = None if grad_states_MD is None else grad_states_MD.to(states_MD.dtype)
        return grad_states, grad_weight_VD, None, None


@torch.library.custom_op("lit_kernels::linear_logprobs", mutates_args=())
def _linear_logprobs(
    states: Tensor, weight: Tensor, target: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and log-normalisers."""
    from lit_kernels.gpu import logprobs

    return logprobs.forward(states, weight, target, temperature, dtype)


@_linear_logprobs.register_fake
def _(
    states: Tensor, weight: Tensor, target: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    logprob, entropy, normaliser = (states.new_empty(states.shape[0], dtype=torch.float32) for _ in range(3))
    return logprob, entropy, normaliser


@torch.library.custom_op("lit_kernels::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    grad_logprob: Tensor, grad_entropy: Tensor, states: Tensor, weight: Tensor, target: Tensor,
    normaliser: Tensor, entropy: Tensor, temperature: float, dtype: torch.dtype, of_states: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of states and weight; one that is not wanted is empty."""
    from lit_kernels.gpu import logprobs

    gradients = (grad_logprob, grad_entropy)
    rows = (target, normaliser, entropy)
    return logprobs.backward(gradients, states, weight, rows, temperature, dtype, of_states, of_weight)


@_linear_logprobs_backward.register_fake
def _(
    grad_logprob: Tensor, grad_entropy: Tensor, states: Tensor, weight: Tensor, target: Tensor,
    normaliser: Tensor, entropy: Tensor, temperature: float, dtype: torch.dtype, of_states: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return states.new_empty(states.shape if of_states else 0), weight.new_empty(weight.shape if of_weight else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, weight, target, ctx.temperature, ctx.dtype = inputs
    _, entropy, normaliser = output
    ctx.save_for_backward(states, weight, target, normaliser, entropy)
    ctx.mark_non_differentiable(normaliser)


def _gradients(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[:2]
    settings = (ctx.temperature, ctx.dtype, *wanted)
    found = _linear_logprobs_backward(grad_logprob, grad_entropy, *ctx.saved_tensors, *settings)
    return *(grad if want else None for grad, want in zip(found, wanted, strict=True)), None, None, None


_linear_logprobs.register_autograd(_gradients, setup_context=_save)
