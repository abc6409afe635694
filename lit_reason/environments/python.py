"""Python as a tool: programs of the policy, run in the sandbox's killable children."""

from __future__ import annotations

from collections.abc import Sequence

from lit_reason.environments.tools import ToolFault
from lit_reason.errors import ConfigError
from lit_reason.sandbox import PYTHON, Sandbox, Verdict
from lit_reason.types import RewardState


class Python:
    """A tool: the program's output and the value of its last line, or its error in one line.

    Programs share nothing: each has a process of its own, without files to write, network or further processes
    (`lit_reason.sandbox`; with bubblewrap installed also behind that).

    Args:
        timeout_s: seconds for one program; what takes longer is told so.
        workers: programs that run side by side.
        memory_mb: address space of one program.
        isolation: `"auto"` (bubblewrap where it works, else limits), `"bwrap"` (refuse without it) or `"limits"`.
        max_chars: the most characters of output that come back.
    """

    def __init__(
        self,
        timeout_s: float = 2.0,
        workers: int = 1,
        memory_mb: int = 512,
        isolation: str = "auto",
        max_chars: int = 512,
    ) -> None:
        if not 1 <= max_chars <= 700:
            raise ConfigError(f"got max_chars={max_chars}; valid: 1 to 700")  # of 4 bytes each they fit one reply
        self.max_chars = max_chars
        self.sandbox = Sandbox(PYTHON, timeout_s, workers, memory_mb, isolation)

    def __call__(self, requests: Sequence[str]) -> list[str | ToolFault]:
        payloads = [{"code": request, "max_chars": self.max_chars} for request in requests]
        return [self._answer(verdict) for verdict in self.sandbox.score(payloads)]

    def _answer(self, verdict: Verdict) -> str | ToolFault:
        if verdict.broken:
            return ToolFault(f"the sandbox failed: {verdict.message}")
        if verdict.state is RewardState.TIMEOUT:
            return f"error: no result within {self.sandbox.timeout_s:g} s"
        if verdict.state is RewardState.ERROR:  # killed, or stopped at what it may not do
            return f"error: {verdict.message}"
        return verdict.text or "(no output)"
