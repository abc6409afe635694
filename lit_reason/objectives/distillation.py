"""Distillation over the full vocabulary, as pure functions. (One token at a time: advantage `distill`.)

T tokens   V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def generalised_jsd(student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, beta: float) -> Tensor:
    """GKD: beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student.

    In nats per token (arXiv 2306.13649).

    Trap: `beta` 0 is KL(teacher || student) and 1 is KL(student || teacher) by convention: the
    formula's own limits are 0, and near them the loss is small, unlike the KL.
    """
    student_TV, teacher_TV = student_logits_TV.log_softmax(-1), teacher_logits_TV.log_softmax(-1)
    if beta == 0:
        return _kl(teacher_TV, student_TV)
    if beta == 1:
        return _kl(student_TV, teacher_TV)
    weights_2 = teacher_TV.new_tensor([beta, 1 - beta]).log()
    mixture_TV = torch.logsumexp(torch.stack([teacher_TV + weights_2[0], student_TV + weights_2[1]]), dim=0)
    return beta * _kl(teacher_TV, mixture_TV) + (1 - beta) * _kl(student_TV, mixture_TV)


def _kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """KL(p || q)."""
    return F.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)
