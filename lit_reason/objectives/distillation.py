"""Distillation over the full vocabulary, as pure functions. (One token at a time: advantage `distill`.)

T tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.objectives.choices import check_value


class Distillation(NamedTuple):
    """The term `weight` times the generalised JSD of `beta` to a teacher, aggregated like the policy's loss."""

    beta: float
    weight: float


def resolve_distillation(spec: Mapping[str, Any]) -> Distillation:
    """`{beta, weight}`; ConfigError for anything else."""
    if set(spec) != set(Distillation._fields):
        raise ConfigError(
            f"distillation: got the keys {sorted(spec)}; valid: beta and weight. "
            "Type 'algorithm.distillation={beta: 0.5, weight: 1.0}'"
        )
    for key, value in spec.items():
        check_value(f"distillation.{key}", value, float)
    check_beta(spec["beta"])
    return Distillation(**spec)


def check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta: got {beta}; valid: 0 (teacher to student) to 1 (student to teacher), e.g. 0.5")


def generalised_jsd(student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, beta: float) -> Tensor:
    """GKD: beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student.

    In nats per token (arXiv 2306.13649).

    Trap: `beta` 0 is KL(teacher || student) and 1 is KL(student || teacher) by convention: the
    formula's own limits are 0, and near them the loss is small, unlike the KL.
    """
    check_beta(beta)
    student_TV, teacher_TV = student_logits_TV.log_softmax(-1), teacher_logits_TV.log_softmax(-1)
    # What both exclude adds nothing; -inf - -inf would.
    neither_TV = (student_TV == -torch.inf) & (teacher_TV == -torch.inf)
    student_TV, teacher_TV = (x.masked_fill(neither_TV, torch.finfo(x.dtype).min / 4) for x in (student_TV, teacher_TV))
    if beta == 0:
        return _kl(teacher_TV, student_TV)
    if beta == 1:
        return _kl(student_TV, teacher_TV)
    weights_2 = teacher_TV.new_tensor([beta, 1 - beta]).log()
    mixture_TV = torch.logsumexp(torch.stack([teacher_TV + weights_2[0], student_TV + weights_2[1]]), dim=0)
    return beta * _kl(teacher_TV, mixture_TV) + (1 - beta) * _kl(student_TV, mixture_TV)


def _kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """KL(p || q); what p excludes adds nothing."""
    p_TV = log_p_TV.exp()
    return (p_TV * (log_p_TV - log_q_TV).masked_fill(p_TV == 0, 0)).sum(-1)
