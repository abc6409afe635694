"""Mutants that do the same as the code, and why. Keyed by `Mutant.key`, which has no line numbers."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {}
