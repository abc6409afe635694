"""Lightning callbacks, one per file; each works alone in any Lightning project."""

from lit_reason.callbacks.activation_checkpointing import ActivationCheckpointing
from lit_reason.callbacks.compile_model import CompileModel
from lit_reason.callbacks.completions import CompletionsTable
from lit_reason.callbacks.coord_check import MuPCoordCheck
from lit_reason.callbacks.expert_load import ExpertLoad
from lit_reason.callbacks.fp8_linear import FP8Linear
from lit_reason.callbacks.fused_logprob import FusedLogProb
from lit_reason.callbacks.grouped_gemm import GroupedGEMM
from lit_reason.callbacks.lr_per_role import RoleLRMonitor
from lit_reason.callbacks.mismatch_guard import MismatchGuard
from lit_reason.callbacks.nan_guard import NonFiniteGuard
from lit_reason.callbacks.progress import PlainProgress, RolloutProgress, progress_bar
from lit_reason.callbacks.qk_clip import QKClip
from lit_reason.callbacks.report import Report

__all__ = [
    "ActivationCheckpointing",
    "CompileModel",
    "CompletionsTable",
    "ExpertLoad",
    "FP8Linear",
    "FusedLogProb",
    "GroupedGEMM",
    "MismatchGuard",
    "MuPCoordCheck",
    "NonFiniteGuard",
    "PlainProgress",
    "QKClip",
    "Report",
    "RoleLRMonitor",
    "RolloutProgress",
    "progress_bar",
]
