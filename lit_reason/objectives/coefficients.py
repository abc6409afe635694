"""The weights of an objective's extra terms, and how they follow what a step measured: an objective's only state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_reason.errors import ConfigError
from lit_reason.objectives.choices import check_value
from lit_reason.objectives.kl import KL, adapted_weight


@dataclass(frozen=True, slots=True)
class EntropyRule:
    """The entropy bonus: `coef` alone is fixed.

    Args:
        coef: weight at the run's start.
        target: entropy (nats per token) under which the bonus acts, and grows; None keeps `coef`.
        step: how much it grows or shrinks per optimizer step.
    """

    coef: float
    target: float | None
    step: float

    def __post_init__(self) -> None:
        check_value("entropy_coef", self.coef, float)
        check_value("entropy_target", self.target, float | None)
        check_value("entropy_step", self.step, float)
        if self.target is not None and not (self.target > 0 and self.step > 0):
            raise ConfigError(
                f"entropy_target: got {self.target} with entropy_step {self.step}; valid: both above 0. "
                "Type algorithm.entropy_target=0.2 algorithm.entropy_step=0.005"
            )


class Coefficients:
    """`kl` and `entropy`, the weights of the next step.

    Args:
        kl: its weight, with a target that it may steer to (arXiv 1909.08593).
        entropy: with a target, c grows by `step` after a step below it and shrinks after one above, and the bonus is
            c below the target and off above (Skywork-OR1, arXiv 2505.22312).
    """

    def __init__(self, kl: KL, entropy: EntropyRule) -> None:
        self._kl_rule, self._entropy_rule = kl, entropy
        self.kl, self.entropy, self._c = kl.weight, entropy.coef, entropy.coef

    def adapt(self, measured: Mapping[str, float]) -> None:
        """After an optimizer step, from its mean `kl/k3` and `entropy`; without them (no token) nothing changes.

        The entropy bonus follows the step before: Skywork looks at the same one.
        """
        if self._kl_rule.target is not None and "kl/k3" in measured:
            self.kl = adapted_weight(self.kl, measured["kl/k3"], self._kl_rule.target, self._kl_rule.rate)
        if (target := self._entropy_rule.target) is not None and "entropy" in measured:
            below = measured["entropy"] <= target
            self._c = max(0.0, self._c + (self._entropy_rule.step if below else -self._entropy_rule.step))
            self.entropy = self._c if below else 0.0

    def metrics(self) -> dict[str, float]:
        """The weights that follow something, to be logged."""
        found = {"coefficient/kl": self.kl} if self._kl_rule.target is not None else {}
        return found | ({"coefficient/entropy": self.entropy} if self._entropy_rule.target is not None else {})

    def state_dict(self) -> dict[str, float]:
        return {"kl": self.kl, "entropy": self.entropy, "c": self._c}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.kl, self.entropy, self._c = state["kl"], state["entropy"], state["c"]
