"""The pool: payloads in, verdicts out, in order. Workers start on first use, are kept, and replaced when they fail."""

from __future__ import annotations

import os
import select
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_reason.errors import ConfigError
from lit_reason.sandbox.launch import check_isolation
from lit_reason.sandbox.process import Worker
from lit_reason.sandbox.verdict import Verdict
from lit_reason.types import RewardState

# Payloads per request: enough to share the cost of a fork, few enough to keep the workers evenly busy.
CHUNK = 32
Items = list[tuple[int, Mapping[str, Any]]]
REASONING_GYM = Path(__file__).with_name("reasoning_gym_scorer.py")
PYTHON = Path(__file__).with_name("python_runner.py")


@dataclass
class _Round:
    """The state of one `score` call: what waits, who is busy, what is known."""

    waiting: deque[Items]
    busy: dict[int, Worker] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    suspects: set[int] = field(default_factory=set)

    def give_up(self, items: Items, state: RewardState, message: str) -> None:
        """Items whose worker failed are each tried once more, alone, so that only the guilty one is charged."""
        for index, payload in reversed(items):
            if index in self.suspects:
                self.verdicts[index] = Verdict(state, message=message, broken=True)
            else:
                self.suspects.add(index)
                self.waiting.appendleft([(index, payload)])


class Sandbox:
    """Scores payloads in killable worker processes, in forked children.

    Example::

        >>> with Sandbox(timeout_s=1.0) as sandbox:
        ...     sandbox.score([{"dataset": "gcd", "entry": entry, "answer": "1"}])
        [Verdict(state=<RewardState.OK: 0>, value=1.0, message='')]

    Args:
        scorer: a Python file with `prepare(payload)` and `is_prepared(payload)` (in the worker, before the fork: they
            must not touch model text), `score(payload) -> float` (in the confined child) and, optionally,
            `shareable(payload)`: may share its child with others; `TEXTS = True`: `score` returns text, of which the
            first 2900 bytes come back; `READABLE`: the only folders whose files may be opened. Default:
            reasoning-gym's own scorers.
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
        check_isolation(isolation)
        self.scorer, self.timeout_s, self.workers = Path(scorer).resolve(), timeout_s, workers
        self.memory_mb, self.isolation, self.start_s = memory_mb, isolation, start_s
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._idle: list[Worker] = []
        self._folders: list[str] = []  # the workers' empty current folder, once there is one
        self._finalizer = weakref.finalize(self, _clean_up, self._idle, self._folders, self._pid)

    def score(self, payloads: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per payload, in their order; payloads must be JSON-able."""
        if os.getpid() != self._pid:  # a forked copy must not talk over its parent's pipes
            self._finalizer.detach()
            self._reset()
        with self._lock:
            return self._score(payloads)

    def _score(self, payloads: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        items = list(enumerate(payloads))
        size = max(1, min(CHUNK, -(-len(items) // self.workers)))
        todo = _Round(deque(items[start : start + size] for start in range(0, len(items), size)))
        try:
            while todo.waiting or todo.busy:
                while todo.waiting and len(todo.busy) < self.workers:
                    self._hand_out(todo)
                self._collect(todo)
        finally:
            for worker in todo.busy.values():  # only when an exception passes through
                worker.kill()
        return [todo.verdicts[index] for index in range(len(items))]

    def _hand_out(self, todo: _Round) -> None:
        items, worker = todo.waiting.popleft(), self._take()
        try:
            worker.send(items, self.timeout_s)
        except OSError as error:
            worker.kill()
            todo.give_up(items, RewardState.ERROR, str(error))
        except (TypeError, ValueError) as error:  # a payload that is not JSON-able: nothing was sent
            self._idle.append(worker)
            todo.give_up(items, RewardState.ERROR, f"{type(error).__name__}: {error}")
        else:
            todo.busy[worker.fd] = worker

    def _collect(self, todo: _Round) -> None:
        if not todo.busy:
            return
        left = min(worker.deadline for worker in todo.busy.values()) - time.monotonic()
        for fd in select.select(list(todo.busy), [], [], max(0.0, left))[0]:
            worker = todo.busy[fd]
            try:
                scored = worker.receive()
            except (OSError, EOFError) as error:
                todo.busy.pop(fd).kill()
                todo.give_up(worker.items, RewardState.ERROR, str(error))
                continue
            if scored is not None:
                todo.verdicts.update(zip((index for index, _ in worker.items), scored, strict=True))
                self._idle.append(todo.busy.pop(fd))
        for fd, worker in list(todo.busy.items()):
            if time.monotonic() > worker.deadline:
                todo.busy.pop(fd).kill()
                todo.give_up(worker.items, RewardState.TIMEOUT, "the worker itself hung")

    def _take(self) -> Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            worker.kill()
        if not self._folders:
            self._folders.append(tempfile.mkdtemp(prefix="lit_reason_sandbox_"))
        return Worker(self.scorer, self._folders[0], self.isolation, self.memory_mb, self.start_s)

    def close(self) -> None:
        """End all workers; a later `score` starts new ones."""
        with self._lock:
            _clean_up(self._idle, self._folders, self._pid)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        """Copies and pickles carry the settings; their workers start anew."""
        settings = (self.scorer, self.timeout_s, self.workers, self.memory_mb, self.isolation, self.start_s)
        return Sandbox, settings


def _clean_up(workers: list[Worker], folders: list[str], owner: int) -> None:
    if os.getpid() != owner:  # in a forked copy both belong to the parent
        return
    while workers:
        workers.pop().kill()
    while folders:
        shutil.rmtree(folders.pop(), ignore_errors=True)
