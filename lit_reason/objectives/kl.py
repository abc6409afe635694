"""Axis 5, the KL term to the frozen reference: which estimator, in which place, with which weight.

    B sequences   T tokens   d = ref - new

Every estimator is a pure function `f(logprobs_BT, ref_logprobs_BT, ratio_BT) -> kl_BT` in nats.

What counts is the *gradient* (d/dnew, in expectation over the new policy), not the value:

| estimator    | value          | gradient as a loss, on-policy                                  |
|--------------|----------------|----------------------------------------------------------------|
| k1           | KL(pi || ref)  | 0: noise only; in the *reward* it is the one that is right     |
| k2           | biased         | that of KL(pi || ref), the reverse KL                          |
| k3           | KL(pi || ref)  | that of KL(ref || pi), the forward KL (GRPO's choice)          |
| k3_plus      | value of k3    | that of k2                                                     |
| k3_corrected | r k3           | that of KL(pi || ref), also for samples of the old policy      |

k1..k3: Schulman, "Approximating KL divergence" (2020); k3_corrected: RPG, arXiv 2505.17508, and DeepSeek-V3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lit_reason.errors import ConfigError, nearest
from lit_reason.objectives.choices import check_value, resolve
from lit_reason.objectives.ratio import safe_exp


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


def k3_corrected(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """r k3, with the gradient through r as well: d/dnew = r (new - ref). Trap: a detached r gives the forward KL."""
    return ratio_BT * k3(logprobs_BT, ref_logprobs_BT, ratio_BT)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3_plus": k3_plus,
    "k3_corrected": k3_corrected,
}


class KL(NamedTuple):
    """The resolved axis. `weight` 0 means that no reference is needed."""

    estimator: Callable[..., Tensor]
    place: Literal["loss", "reward", "token_reward"]
    weight: float


def resolve_kl(spec: Mapping[str, Any] | None) -> KL:
    """`{estimator, place, weight}` or None (no KL term) to functions.

    Raises:
        ConfigError: a wrong key or value, or an estimator other than k1 in the reward, where k2 and k3 have the
            gradient of neither KL.
    """
    if spec is None:
        return KL(k3, "loss", 0.0)
    if not isinstance(spec, Mapping):
        raise ConfigError(f"kl: got {spec!r}; valid: {{estimator, place, weight}} or null. Type algorithm.kl.weight=0")
    for key in spec:
        if key not in KL._fields:
            raise ConfigError(f"kl: got key {key!r}; {nearest(str(key), KL._fields)}. Type algorithm.kl.KEY=VALUE")
    for key in KL._fields:
        if key not in spec:
            raise ConfigError(f"kl: {key!r} is missing, got {sorted(spec)}. Type +algorithm.kl.{key}=VALUE")
    estimator = resolve("kl.estimator", spec["estimator"], ESTIMATORS)
    check_value("kl.place", spec["place"], Literal["loss", "reward", "token_reward"])
    check_value("kl.weight", spec["weight"], float)
    if spec["place"] != "loss" and spec["estimator"] != "k1":
        raise ConfigError(
            f"kl: got estimator {spec['estimator']!r} with place {spec['place']!r}; valid in the reward: k1 (the "
            "others have the gradient of neither KL there). Type algorithm.kl.estimator=k1, or algorithm.kl.place=loss"
        )
    return KL(estimator, spec["place"], float(spec["weight"]))
