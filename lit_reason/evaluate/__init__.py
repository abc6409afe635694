"""pass@k, maj@k and avg@k with question-clustered intervals, and before/after comparisons."""

from lit_reason.evaluate.compare import Comparison, compare
from lit_reason.evaluate.evaluator import EvalItem, EvalReport, evaluate
from lit_reason.evaluate.metrics import (
    Estimate,
    PairedDifference,
    majority,
    mean,
    normalise_answer,
    paired_difference,
    pass_at_k,
    proportion,
    wilson_interval,
)

__all__ = [
    "Comparison",
    "Estimate",
    "EvalItem",
    "EvalReport",
    "PairedDifference",
    "compare",
    "evaluate",
    "majority",
    "mean",
    "normalise_answer",
    "paired_difference",
    "pass_at_k",
    "proportion",
    "wilson_interval",
]
