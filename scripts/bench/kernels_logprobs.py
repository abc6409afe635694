"""Cases of a head: log-probs of targets, and entropies, from states and weight. See kernels_measure.py.

Shapes: M targets, V vocabulary, D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench.kernels_compare import Checks, closeness
from bench.kernels_measure import Kind, Made, Place, Run, ways
from bench.kernels_streams import normal
from lit_kernels.logprobs import linear_logprobs
from torch import Tensor

Way = Callable[[], tuple[Tensor, Tensor]]


def inputs(place: Place, M: int, V: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """States and weight whose logits have a deviation of 1, and targets."""
    weight = normal(place, V, D) / D**0.5
    return normal(place, M, D), weight, torch.randint(V, (M,), device=place.device)


def naive(states: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers have it: whole logits, in float32 behind the product; the entropy is for the log only."""
    logp = F.linear(states, weight).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, target[:, None]).squeeze(1), entropy


def training(place: Place, M: int, V: int, D: int) -> Made:
    """Log-probs and entropies, and the gradients of a weighted sum of the log-probs."""
    states, weight, target = inputs(place, M, V, D)
    grad_M, grad_MV = torch.randn(M, device=place.device), normal(place, M, V)
    states.requires_grad_()
    weight.requires_grad_()

    def trained(way: Way) -> tuple[Tensor, ...]:
        logp, entropy = way()
        return logp.detach(), entropy.detach(), *torch.autograd.grad(logp, [states, weight], grad_M)

    def products() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            F.linear(states, weight)
            return grad_MV @ weight, grad_MV.t() @ states

    sides = ways(lambda backend: trained(lambda: linear_logprobs(states, weight, target, backend=backend)), place.ours)
    sides |= {"naive": lambda: trained(lambda: naive(states, weight, target)), "bare GEMMs": products}
    return Made(sides, sides["naive"], with_the_largest, flops=6 * M * V * D, memory=True)


def peaked(place: Place, M: int, V: int, D: int) -> Made:
    """Targets from as likely as any to nearly certain: a log-prob of almost 0 is where rounding could make one positive
    (verl #2656)."""
    _, weight, target = inputs(place, M, V, D)
    sharpness_M1 = torch.linspace(0, 40, M, device=place.device)[:, None]
    states = (weight[target] * sharpness_M1).to(torch.bfloat16)
    sides: dict[str, Run] = ways(lambda backend: linear_logprobs(states, weight, target, backend=backend), place.ours)
    sides["naive"] = lambda: naive(states, weight, target)
    return Made(sides, sides["naive"], lambda result, _: {"largest": float(result[0].max())}, flops=2 * M * V * D)


def with_the_largest(result: Any, reference: Any) -> Checks:
    return {**closeness(result, reference), "largest": float(result[0].max())}


HEADS = ((8192, 129280, 7168),)
GROUPS = {
    "logprobs": (
        Kind("fwd+bwd", training, "linear_logprobs", HEADS, ((8192, 151936, 4096), (8192, 32768, 1024)), (16, 96, 32)),
        Kind("peaked", peaked, "", HEADS, (), (16, 96, 32)),
    )
}
