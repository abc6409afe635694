"""One worker process seen from the trainer: start, send a request, read a reply, kill."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_reason.errors import RewardError
from lit_reason.sandbox.launch import command, environment, module_path
from lit_reason.sandbox.verdict import Verdict
from lit_reason.types import RewardState

# The worker itself ends a child at its deadline; this much later the worker is taken for stuck.
GRACE_S = 8.0


class Worker:
    """A started worker. It holds at most one request at a time."""

    def __init__(self, scorer: Path, folder: str, isolation: str, memory_mb: int, start_s: float) -> None:
        self._process = subprocess.Popen(
            command(isolation, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment(folder),
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self.fd = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._buffer = b""
        self.items: list[tuple[int, Mapping[str, Any]]] = []
        self._nonce = ""
        self.deadline = time.monotonic() + start_s
        self._write({"scorer": str(scorer), "path": module_path(), "memory_bytes": memory_mb * 2**20})
        hello = self._wait_hello()
        if "ready" not in hello:
            self.kill()
            raise RewardError(f"the scoring worker for {scorer.name} did not start: {hello.get('error')}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, items: list[tuple[int, Mapping[str, Any]]], timeout_s: float) -> None:
        """Hand over (index, payload) pairs; raises OSError when the worker is gone or does not read."""
        self.items = items
        self.deadline = time.monotonic() + timeout_s * len(items) + GRACE_S
        self._nonce = secrets.token_hex(16)
        self._write({"nonce": self._nonce, "timeout_s": timeout_s, "payloads": [payload for _, payload in items]})

    def receive(self) -> list[Verdict] | None:
        """The verdicts of the items in flight; None while only part of them has arrived. EOFError: the worker ended."""
        reply = self._read_line()
        if reply is None:
            return None
        if reply.get("nonce") != self._nonce or len(reply["verdicts"]) != len(self.items):
            raise EOFError("the worker answered another request than was asked")
        return [_verdict(*entry) for entry in reply["verdicts"]]

    def kill(self) -> None:
        """End the worker and its process group; its children die with it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            _, ready, _ = select.select([], [self._in], [], max(0.0, self.deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("the worker does not read its requests")
            data = data[os.write(self._in, data) :]

    def _read_line(self) -> dict[str, Any] | None:
        if b"\n" not in self._buffer:
            chunk = os.read(self.fd, 65536)
            if not chunk:
                raise EOFError("the worker ended")
            self._buffer += chunk
        if b"\n" not in self._buffer:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _wait_hello(self) -> dict[str, Any]:
        while select.select([self.fd], [], [], max(0.0, self.deadline - time.monotonic()))[0]:
            try:
                line = self._read_line()
            except EOFError:
                return {"error": "it ended at once"}
            if line is not None:
                return line
        return {"error": "it said nothing in time"}


def _verdict(state: str, value: float | None, message: str) -> Verdict:
    if state == "OK" and value is not None:
        return Verdict(RewardState.OK, float(value))
    if state == "TEXT":
        return Verdict(RewardState.OK, text=message)
    return Verdict(RewardState[state], message=message)
