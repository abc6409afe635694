"""Errors of the project. Each is also the standard type a caller would expect, and each message says
what was got, what is valid, and what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LitReasonError(Exception):
    """Base of every error that lit_reason raises on purpose."""


class ConfigError(LitReasonError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(LitReasonError, ValueError):
    """A dataset, prompt or tokenizer cannot be used as given."""


class RewardError(LitReasonError, RuntimeError):
    """Verifiers failed on more completions than is allowed."""


class RolloutError(LitReasonError, RuntimeError):
    """The engine could not generate what was asked."""


class EngineDiedError(RolloutError):
    """The process of an engine ended."""


class EngineStalledError(RolloutError, TimeoutError):
    """An engine gave no sign of life within its deadline."""


class WeightSyncError(LitReasonError, RuntimeError):
    """An engine holds other weights than the trainer."""


class NonFiniteError(LitReasonError, ArithmeticError):
    """A loss, gradient or log-probability is NaN or infinite."""


class CheckpointError(LitReasonError, RuntimeError):
    """A checkpoint is damaged or does not fit the run."""


class ZooError(LitReasonError, RuntimeError):
    """A zoo entry is unknown, damaged or incomplete."""


class UnsafeTargetError(LitReasonError, PermissionError):
    """A `_target_` that lit_reason refuses to import or call."""


def nearest(got: str, valid: Iterable[str], n: int = 3) -> str:
    """A sentence part that names the closest valid spellings.

    Example::

        >>> nearest("gpdo", ["grpo", "gdpo", "dapo"])
        "did you mean 'gdpo' or 'grpo'? valid: dapo, gdpo, grpo"
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(got, valid, n=max(n, len(valid)), cutoff=0.5)
    # Swapped letters are the likeliest slip, and a similarity by blocks ranks them no higher than a wrong letter.
    close = sorted(close, key=lambda word: sorted(word) != sorted(got))[:n]
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"
