"""An engine in a process of its own, seen from the trainer: calls with deadlines, weights through shared memory.

A process of its own because an engine changes its process (vLLM: random state, process group, thread count), because
it can then generate while the trainer trains, and because what runs in the trainer cannot be ended when it hangs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lit_reason.errors import ConfigError, EngineDiedError, EngineStalledError, RolloutError, nearest
from lit_reason.rollout.worker import packed

BUCKET = 64 << 20  # bytes of tensors sent at a time; a larger tensor goes alone
_STACKS_S = 3.0  # what a process that stalls gets to write its stacks


@dataclass(frozen=True)
class Deadlines:
    """Seconds without a sign of life after which an engine counts as stalled.

    Args:
        start: of start-up, whole.
        generate: between two steps of generation.
        push: between two parts of a weight push; also what a question about its weights may take.
    """

    start: float = 300.0
    generate: float = 120.0
    push: float = 120.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"rollout.engine.deadlines.{name}={value}: seconds, above 0")

    @classmethod
    def named(cls, given: Mapping[str, float] | None, **defaults: float) -> Deadlines:
        """Those of `given`, else of `defaults`; ConfigError for a name that there is not."""
        if unknown := set(given or {}) - set(cls.__dataclass_fields__):
            raise ConfigError(f"rollout.engine.deadlines: {nearest(min(unknown), cls.__dataclass_fields__)}")
        return cls(**{**defaults, **(given or {})})


class EngineProcess:
    """A child that hosts an engine, from `start` on.

    Args:
        host: "module:Class" of a `worker.Host`.
        environment: variables beside the trainer's own.
        cores: the CPU cores that it may use, all if None.
    """

    def __init__(
        self,
        host: str,
        environment: Mapping[str, str] | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        self.name = host.partition(":")[2]
        self._connection, theirs = Pipe()
        self._memory = os.memfd_create("lit_reason-weights")
        handle, log = tempfile.mkstemp(prefix="lit_reason-engine-", suffix=".log")
        self.log = Path(log)
        path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "lit_reason.rollout.worker", str(theirs.fileno()), str(self._memory), host]
        if cores is not None:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            pass_fds=(theirs.fileno(), self._memory),
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            start_new_session=True,
        )
        os.close(handle)
        theirs.close()
        self._numbers = itertools.count()
        self._answers: dict[int, queue.SimpleQueue[tuple[str, Any]]] = {}
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(target=_read, args=(self._connection, self._answers), daemon=True)
        # A stopped child reads nothing: whoever wrote to its full pipe would wait for ever.
        writer = threading.Thread(target=_write_all, args=(self._connection, self._outbox), daemon=True)
        held = (self._process, self._connection, self._memory, self.log, self._outbox, (self._reader, writer))
        self._finalizer = weakref.finalize(self, _end, os.getpid(), *held)
        self._reader.start()
        writer.start()

    def start(self, settings: Mapping[str, Any], start_s: float) -> None:
        """Makes the host.

        Args:
            settings: what its constructor gets.
            start_s: seconds that it may take.

        Raises:
            EngineDiedError, EngineStalledError, RolloutError: it did not start; with its last words.
        """
        try:
            self.call("start", dict(settings), silence_s=start_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, kind: str, *payload: Any, silence_s: float, heard: Callable[[Any], None] | None = None) -> Any:
        """The host's answer.

        Args:
            silence_s: seconds without a message after which it counts as stalled; it is then ended.
            heard: given what the host tells on the way.

        Raises:
            EngineStalledError, EngineDiedError: with the process's stacks or last words; it is gone then.
            RolloutError: the host failed; with its traceback.
        """
        number = self._ask(kind, payload)
        try:
            while True:
                said, value = self._hear(number, kind, silence_s)
                if said == "done":
                    return value
                if heard is not None:
                    heard(value)
        finally:
            self._answers.pop(number, None)

    def send(self, kind: str, *payload: Any, tensors: Iterable[tuple[str, Tensor]], silence_s: float) -> None:
        """A call whose host takes `tensors`, which are sent some at a time: never more than `BUCKET` bytes or the
        largest of them exist twice.

        Trap: after any error the host may hold half of them, or still wait for the rest: close it.
        """
        number = self._ask(kind, payload)
        try:
            for bucket in buckets(tensors, BUCKET):
                self._write(number, "tensors", packed(bucket, self._memory))
                self._hear(number, kind, silence_s)
            self._write(number, "tensors", None)
            self._hear(number, kind, silence_s)
        finally:
            self._answers.pop(number, None)

    def close(self) -> None:
        """Ends the process and all that it started."""
        self._finalizer()

    def _ask(self, kind: str, payload: tuple[Any, ...]) -> int:
        number = next(self._numbers)
        self._answers[number] = queue.SimpleQueue()
        self._write(number, kind, payload)
        return number

    def _write(self, number: int, kind: str, payload: Any) -> None:
        self._outbox.put(ForkingPickler.dumps((number, kind, payload)))

    def _hear(self, number: int, kind: str, silence_s: float) -> tuple[str, Any]:
        until = time.monotonic() + silence_s
        said, value = "", cast(Any, None)
        while not said:
            try:
                said, value = self._answers[number].get(timeout=min(1.0, max(until - time.monotonic(), 0.01)))
            except queue.Empty:
                # It left before this call was written; or what it started holds its end of the pipe open.
                if not self._reader.is_alive() or not self.alive:
                    said = "died"
                elif time.monotonic() > until:
                    raise self._stalled(kind, silence_s) from None
        if said == "died":
            raise self._died(kind)
        if said == "failed":
            kind_of_error, text, trace = cast(tuple[str, str, str], value)
            raise RolloutError(f"{self.name} failed to {kind}: {kind_of_error}: {text}\nIn its process:\n{trace}")
        return said, value

    def _died(self, doing: str) -> EngineDiedError:
        if not self._finalizer.alive:
            return EngineDiedError(f"the process of {self.name} was closed while asked to {doing}")
        code = self._ended()
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        memory = " Out of memory? The kernel kills in that way." if code == -signal.SIGKILL else ""
        message = f"the process of {self.name} {how} while asked to {doing}.{memory}\nIts last words:\n{self._words()}"
        self.close()
        return EngineDiedError(message)

    def _stalled(self, doing: str, silence_s: float) -> EngineStalledError:
        state = _state(self.pid)
        was_stopped = " It was stopped (SIGSTOP)." if state == "T" else ""
        with contextlib.suppress(OSError):  # it is gone, or another thread that waited has closed it
            before = self.log.stat().st_size
            os.kill(self.pid, signal.SIGUSR1)  # faulthandler writes the stacks
            os.kill(self.pid, signal.SIGCONT)
            until = time.monotonic() + _STACKS_S
            while self.log.stat().st_size == before and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.2)
        message = (
            f"{self.name} gave no sign of life for {silence_s:g} s while asked to {doing}; process {self.pid} was in "
            f"state {state} and has been ended.{was_stopped} If it only needs longer: rollout.engine.deadlines\n"
            f"Its stacks:\n{self._words()}"
        )
        self.close()
        return EngineStalledError(message)

    def _ended(self) -> int:
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _words(self) -> str:
        """The end of its log."""
        try:
            return self.log.read_bytes()[-6000:].decode(errors="replace").strip() or "(none)"
        except OSError:
            return "(its log is gone)"


def buckets(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Groups of at most `limit` bytes, in order; a larger tensor alone."""
    group: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > limit:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += tensor.nbytes
    if group:
        yield group


def _read(connection: Any, answers: dict[int, queue.SimpleQueue[tuple[str, Any]]]) -> None:
    """Deals the child's messages out to whoever waits for them."""
    while True:
        try:
            number, said, value = connection.recv()
        except (EOFError, OSError):
            for waiting in list(answers.values()):
                waiting.put(("died", None))
            return
        except Exception as error:  # an answer that cannot be read here, e.g. of a class that this process lacks
            for waiting in list(answers.values()):
                waiting.put(("failed", (type(error).__name__, f"its answer cannot be read: {error}", "")))
            continue
        if (waiting := answers.get(number)) is not None:  # whoever asked may have given up meanwhile
            waiting.put((said, value))


def _write_all(connection: Any, outbox: queue.SimpleQueue[Any]) -> None:
    while (message := outbox.get()) is not None:
        try:
            connection.send_bytes(message)
        except OSError:
            return  # the reader tells those who wait


def _end(
    owner: int,
    process: subprocess.Popen[bytes],
    connection: Any,
    memory: int,
    log: Path,
    outbox: queue.SimpleQueue[Any],
    threads: Sequence[threading.Thread],
) -> None:
    """No orphans: the whole session is killed, gently or not, also at the interpreter's exit."""
    if os.getpid() != owner:
        return  # a fork of the trainer exits: the engine is not its own
    outbox.put(None)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for thread in threads:  # a closed descriptor's number may be another file's the next moment
        if thread is not threading.current_thread():
            thread.join(timeout=5)
    connection.close()
    os.close(memory)
    log.unlink(missing_ok=True)


def _state(pid: int) -> str:
    """Its letter in /proc: R runs, S sleeps, D waits for a device, T is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "?"
