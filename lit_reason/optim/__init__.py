"""Optimizers whose groups come from muP roles."""

from lit_reason.optim.adam_mini import AdamMini
from lit_reason.optim.adamw import AdamW
from lit_reason.optim.composite import Composite
from lit_reason.optim.groups import parameter_groups
from lit_reason.optim.muon import MarsM, Muon
from lit_reason.optim.preconditioned import SOAP, Shampoo
from lit_reason.optim.recipe import OptimizerRecipe, Recipe
from lit_reason.optim.schedules import schedule

__all__ = [
    "SOAP",
    "AdamMini",
    "AdamW",
    "Composite",
    "MarsM",
    "Muon",
    "OptimizerRecipe",
    "Recipe",
    "Shampoo",
    "parameter_groups",
    "schedule",
]
