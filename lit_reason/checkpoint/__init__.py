"""Crash-safe checkpoints, the run directory, exact resume."""

from lit_reason.checkpoint.callback import Checkpoint
from lit_reason.checkpoint.io import SafeCheckpointIO
from lit_reason.checkpoint.resume import find_resume
from lit_reason.checkpoint.rng import RNGState, get_rng_state, set_rng_state
from lit_reason.checkpoint.run_dir import RunDir
from lit_reason.checkpoint.signals import SaveOnSignal

__all__ = [
    "Checkpoint",
    "RNGState",
    "RunDir",
    "SafeCheckpointIO",
    "SaveOnSignal",
    "find_resume",
    "get_rng_state",
    "set_rng_state",
]
