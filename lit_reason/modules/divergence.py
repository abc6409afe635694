"""The divergence of a student's next-token distributions from a teacher's, from the states that their heads read.

Shapes: M targets, D width (student and teacher may differ), V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_reason.modules.chunked import by_rows, row_chunk
from lit_reason.objectives import generalised_jsd


def head_divergence(
    student_head: nn.Module,
    student_states_MD: Tensor,
    teacher_head: nn.Module,
    teacher_states_MD: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
) -> Tensor:
    """`generalised_jsd` of softmax(logits / temperature), student and teacher, per token: (M,) nats, float32 at least.

    The teacher has no gradient. Neither side's logits exist for more than `chunked.LOGITS` elements at once.

    Raises:
        ConfigError: `beta` is no share.
    """

    def divergence(student_MD: Tensor, teacher_MD: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            teacher_MV = _tempered(teacher_head(teacher_MD), temperature)
        return (generalised_jsd(_tempered(student_head(student_MD), temperature), teacher_MV, beta=beta),)

    rows = row_chunk(student_head, student_states_MD)
    return by_rows(divergence, rows, student_states_MD, teacher_states_MD)[0]


def _tempered(logits_MV: Tensor, temperature: float) -> Tensor:
    return logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)) / temperature
