"""Axis 5, the KL term to a reference: named by where it stands, and by the gradient that it has there.

    B sequences   T tokens   d = ref - new   r ratio   sg stop-gradient

A term is an estimator, a pure function `f(logprobs_BT, ref_logprobs_BT, ratio_BT) -> kl_BT` in nats, in one place: the
loss, the reward of a sequence, or each token's reward. What counts is not its value but its *gradient*, in expectation:

| name             | value           | samples of the policy itself | samples of an older policy        |
|------------------|-----------------|------------------------------|-----------------------------------|
| k1_reward        | KL(pi || ref)   | reverse                      | neither: the reward is a constant |
| k1_token_reward  | KL(pi || ref)   | reverse                      | neither: the reward is a constant |
| k1_loss          | KL(pi || ref)   | none: noise around 0         | neither                           |
| k2_loss          | biased          | reverse                      | neither                           |
| k3_loss          | KL(pi || ref)   | forward (GRPO's choice)      | neither                           |
| k3_plus_loss     | value of k3     | reverse                      | neither                           |
| k2_is_loss       | biased          | reverse                      | reverse                           |
| k3_is_loss       | KL(pi || ref)   | forward                      | forward                           |
| k3_is_corrected  | KL(pi || ref)   | reverse                      | reverse                           |

reverse: of KL(pi || ref), which keeps the policy where the reference is; forward: of KL(ref || pi), which keeps it
everywhere the reference is. k1..k3: Schulman, "Approximating KL divergence" (2020). Every cell is tested by exact
enumeration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lit_reason.errors import ConfigError, nearest
from lit_reason.objectives.choices import check_value
from lit_reason.objectives.ratio import safe_exp

Place = Literal["loss", "reward", "token_reward"]


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """-d = new - ref. Trap: as a loss its gradient is 1 on every token, whatever the reference."""
    return logprobs_BT - ref_logprobs_BT


def k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """d^2 / 2. Trap: a biased value; never compare it with k1 or k3 in a plot."""
    return (ref_logprobs_BT - logprobs_BT).square() / 2


def k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """e^d - d - 1 >= 0 (GRPO, arXiv 2402.03300 eq. 4). Trap: pulls like the forward KL; off-policy, like neither."""
    difference_BT = ref_logprobs_BT - logprobs_BT
    return safe_exp(difference_BT) - difference_BT - 1


def k3_plus(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """Value of k3, gradient of k2 (straight-through). Trap: the loss curve shows one, the optimizer sees the other."""
    pull_BT = k2(logprobs_BT, ref_logprobs_BT, ratio_BT)
    return pull_BT - pull_BT.detach() + k3(logprobs_BT, ref_logprobs_BT, ratio_BT).detach()


def k2_is(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """sg[r] k2. Trap: with the gradient through r as well it would be that of another divergence."""
    return ratio_BT.detach() * k2(logprobs_BT, ref_logprobs_BT, ratio_BT)


def k3_is(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """sg[r] k3. Trap: one stop-gradient away from `k3_is_corrected`, and the opposite KL."""
    return ratio_BT.detach() * k3(logprobs_BT, ref_logprobs_BT, ratio_BT)


def k3_corrected(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """r k3, with the gradient through r as well: d/dnew = r (new - ref) (RPG, arXiv 2505.17508; DeepSeek-V3.2).

    Trap: a detached r gives the forward KL.
    """
    return ratio_BT * k3(logprobs_BT, ref_logprobs_BT, ratio_BT)


class Term(NamedTuple):
    """An estimator in its place; `gradient` is what it pulls along with samples of the policy itself."""

    estimator: Callable[[Tensor, Tensor, Tensor], Tensor]
    place: Place
    gradient: Literal["reverse", "forward", "none"]


KL_TERMS: dict[str, Term] = {
    "k1_reward": Term(k1, "reward", "reverse"),
    "k1_token_reward": Term(k1, "token_reward", "reverse"),
    "k1_loss": Term(k1, "loss", "none"),
    "k2_loss": Term(k2, "loss", "reverse"),
    "k3_loss": Term(k3, "loss", "forward"),
    "k3_plus_loss": Term(k3_plus, "loss", "reverse"),
    "k2_is_loss": Term(k2_is, "loss", "reverse"),
    "k3_is_loss": Term(k3_is, "loss", "forward"),
    "k3_is_corrected": Term(k3_corrected, "loss", "reverse"),
}


class KL(NamedTuple):
    """The resolved axis.

    Args:
        term: one of `KL_TERMS`.
        weight: of the term at the run's start; 0 means that no reference is needed.
        target: KL per token (nats) that an adaptive weight steers to; None keeps the weight.
        rate: largest relative change of the weight per optimizer step is 0.2 times this.
    """

    term: Term
    weight: float
    target: float | None = None
    rate: float = 0.1


def resolve_kl(spec: Mapping[str, Any] | None) -> KL:
    """`{name, weight}`, with `target` and `rate` for an adaptive weight, or None (no KL term).

    Raises:
        ConfigError: a wrong key, name or value, or a target for a weight of 0, which would stay 0.
    """
    if spec is None:
        return KL(KL_TERMS["k3_loss"], 0.0)
    if not isinstance(spec, Mapping):
        raise ConfigError(f"kl: got {spec!r}; valid: {{name, weight}} or null. Type algorithm.kl.weight=0")
    keys = ("name", "weight", "target", "rate")
    for key in spec:
        if key not in keys:
            raise ConfigError(f"kl: got key {key!r}; {nearest(str(key), keys)}. Type algorithm.kl.KEY=VALUE")
    for key in keys[:2]:
        if key not in spec:
            raise ConfigError(f"kl: {key!r} is missing, got {sorted(spec)}. Type +algorithm.kl.{key}=VALUE")
    name = spec["name"]
    if name not in KL_TERMS:
        raise ConfigError(f"kl.name: got {name!r}; {nearest(str(name), KL_TERMS)}. Type algorithm.kl.name=NAME")
    check_value("kl.weight", spec["weight"], float)
    check_value("kl.target", spec.get("target"), float | None)
    check_value("kl.rate", spec.get("rate", 0.1), float)
    kl = KL(KL_TERMS[name], **{key: spec[key] for key in keys[1:] if key in spec})
    if kl.target is not None and not (kl.weight > 0 and kl.target > 0):
        raise ConfigError(
            f"kl: got target {kl.target} with weight {kl.weight}; valid: both above 0, for the weight is multiplied. "
            "Type algorithm.kl.weight=0.001"
        )
    return kl


def adapted_weight(weight: float, kl: float, target: float, rate: float) -> float:
    """The KL weight after a step that measured `kl` nats per token: weight (1 + rate clip(kl / target - 1, +-0.2)).

    Ziegler et al., arXiv 1909.08593 section 2.2 (there rate 0.1, and the KL of a whole sequence).
    """
    return weight * (1 + rate * max(-0.2, min(0.2, kl / target - 1)))
