"""Sizes that a CPU meets often enough."""

from __future__ import annotations


def round_up(n: int) -> int:
    """n rounded up to one of 8 sizes per octave, 16 at least.

    The CPU's matrix library compiles a kernel for every new shape (some milliseconds and some memory each), so row
    counts that change at every call must fall on few values.
    """
    step = max(16, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step
