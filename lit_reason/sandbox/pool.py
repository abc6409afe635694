"""The pool: payloads in, verdicts out, in order. Workers start on first use, are kept, and replaced when they fail."""

from __future__ import annotations

import os
import select
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_reason.errors import ConfigError
from lit_reason.sandbox.process import Worker
from lit_reason.sandbox.verdict import Verdict
from lit_reason.types import RewardState

# Payloads per request: enough to share the cost of a fork, few enough to keep the workers evenly busy.
CHUNK = 32
Items = list[tuple[int, Mapping[str, Any]]]
REASONING_GYM = Path(__file__).with_name("reasoning_gym_scorer.py")


class Sandbox:
    """Scores payloads in killable worker processes, in forked children.

    Example::

        >>> with Sandbox(timeout_s=1.0) as sandbox:
        ...     sandbox.score([{"dataset": "gcd", "entry": entry, "answer": "1"}])
        [Verdict(state=<RewardState.OK: 0>, value=1.0, message='')]

    Args:
        scorer: a Python file with `prepare(payload)` and `is_prepared(payload)` (in the worker, before the fork: they
            must not touch model text), `score(payload) -> float` (in the confined child) and, optionally,
            `shareable(payload)`: may share its child with others. Default: reasoning-gym's own scorers.
        timeout_s: wall-clock seconds for one payload; beyond it the verdict is TIMEOUT.
        workers: processes that score side by side.
        memory_mb: address space of one child.
        isolation: `"auto"` (bubblewrap where it works, else limits), `"bwrap"` (refuse without it) or `"limits"`.
        start_s: seconds within which a worker must have loaded its scorer.
    """

    def __init__(
        self,
        scorer: str | Path = REASONING_GYM,
        timeout_s: float = 2.0,
        workers: int = 1,
        memory_mb: int = 1024,
        isolation: str = "auto",
        start_s: float = 60.0,
    ) -> None:
        if timeout_s <= 0 or workers < 1:
            raise ConfigError(f"got timeout_s={timeout_s}, workers={workers}; valid: timeout_s > 0 and workers >= 1")
        self.scorer, self.timeout_s, self.workers = Path(scorer).resolve(), timeout_s, workers
        self.memory_mb, self.isolation, self.start_s = memory_mb, isolation, start_s
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._idle: list[Worker] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._finalizer = weakref.finalize(self, _kill_all, self._idle, self._pid)

    def score(self, payloads: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per payload, in their order; payloads must be JSON-able."""
        if os.getpid() != self._pid:  # a forked copy must not talk over its parent's pipes
            self._finalizer.detach()
            self._reset()
        with self._lock:
            return self._score(payloads)

    def _score(self, payloads: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        verdicts: list[Verdict] = [Verdict(RewardState.ERROR, message="not scored")] * len(payloads)
        items = list(enumerate(payloads))
        size = max(1, min(CHUNK, -(-len(items) // self.workers)))
        waiting = deque(items[start : start + size] for start in range(0, len(items), size))
        busy: dict[int, Worker] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    self._hand_out(waiting, busy, verdicts)
                self._collect(waiting, busy, verdicts)
        finally:
            for worker in busy.values():  # only when an exception passes through
                worker.kill()
        return verdicts

    def _hand_out(self, waiting: deque[Items], busy: dict[int, Worker], verdicts: list[Verdict]) -> None:
        items, worker = waiting.popleft(), self._take()
        try:
            worker.send(items, self.timeout_s)
        except (OSError, TypeError, ValueError) as error:  # the worker is gone, or a payload is not JSON-able
            _give_up(worker, items, waiting, verdicts, RewardState.ERROR, f"{type(error).__name__}: {error}")
        else:
            busy[worker.fd] = worker

    def _collect(self, waiting: deque[Items], busy: dict[int, Worker], verdicts: list[Verdict]) -> None:
        if not busy:
            return
        left = min(worker.deadline for worker in busy.values()) - time.monotonic()
        for fd in select.select(list(busy), [], [], max(0.0, left))[0]:
            worker = busy[fd]
            try:
                scored = worker.receive()
            except (OSError, EOFError) as error:
                _give_up(busy.pop(fd), worker.items, waiting, verdicts, RewardState.ERROR, str(error))
                continue
            if scored is not None:
                for (index, _), verdict in zip(worker.items, scored, strict=True):
                    verdicts[index] = verdict
                self._idle.append(busy.pop(fd))
        for fd, worker in list(busy.items()):
            if time.monotonic() > worker.deadline:
                _give_up(busy.pop(fd), worker.items, waiting, verdicts, RewardState.TIMEOUT, "the worker itself hung")

    def _take(self) -> Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            worker.kill()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lit_reason_sandbox_")
        return Worker(self.scorer, self._folder.name, self.isolation, self.memory_mb, self.start_s)

    def close(self) -> None:
        """End all workers; a later `score` starts new ones."""
        with self._lock:
            _kill_all(self._idle, self._pid)
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        """Copies and pickles carry the settings; their workers start anew."""
        settings = (self.scorer, self.timeout_s, self.workers, self.memory_mb, self.isolation, self.start_s)
        return Sandbox, settings


def _kill_all(workers: list[Worker], owner: int) -> None:
    while workers and os.getpid() == owner:
        workers.pop().kill()


def _give_up(
    worker: Worker, items: Items, waiting: deque[Items], verdicts: list[Verdict], state: RewardState, message: str
) -> None:
    """End a failed worker; its items are tried again one by one, so that only the guilty one is charged."""
    worker.kill()
    if len(items) > 1:
        waiting.extendleft([item] for item in reversed(items))
    else:
        verdicts[items[0][0]] = Verdict(state, message=message)
