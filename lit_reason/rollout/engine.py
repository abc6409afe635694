"""The engine protocol: what RL asks of whatever generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from lit_reason.rollout.sampling import Sampling
from lit_reason.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a generation stands: `done` of `total` completions, `tokens` generated in `seconds`."""

    done: int
    total: int
    tokens: int
    seconds: float


OnProgress = Callable[[Progress], None]


@runtime_checkable
class Engine(Protocol):
    """Generates with the weights it was last pushed."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[Completion]:
        """One completion per entry of `prompts`, in their order; for G samples of a prompt repeat it G times."""
        ...

    def push(self, model: nn.Module, version: int) -> None:
        """Takes over `model`'s weights and buffers as policy `version`."""
        ...

    def version(self) -> int:
        """The version last pushed, -1 before the first."""
        ...
