"""LightningModules: pretraining, supervised priming, and the policy with its reference."""

from lit_reason.modules.base import LanguageModule
from lit_reason.modules.logprobs import token_logprobs
from lit_reason.modules.policy import PolicyModule
from lit_reason.modules.supervised import PretrainModule, SFTModule

__all__ = ["LanguageModule", "PolicyModule", "PretrainModule", "SFTModule", "token_logprobs"]
