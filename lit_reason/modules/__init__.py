"""LightningModules: pretraining, supervised priming, and the policy with its reference."""

from lit_reason.modules.base import LanguageModule
from lit_reason.modules.logprobs import token_logprobs
from lit_reason.modules.policy import PolicyModule
from lit_reason.modules.reference import EMA, Frozen, Reference, Refreshed, Teacher
from lit_reason.modules.supervised import PretrainModule, SFTModule

__all__ = [
    "EMA",
    "Frozen",
    "LanguageModule",
    "PolicyModule",
    "PretrainModule",
    "Reference",
    "Refreshed",
    "SFTModule",
    "Teacher",
    "token_logprobs",
]
