"""Optimizers whose groups come from muP roles."""

from lit_reason.optim.adamw import AdamW
from lit_reason.optim.groups import parameter_groups
from lit_reason.optim.schedules import schedule

__all__ = ["AdamW", "parameter_groups", "schedule"]
