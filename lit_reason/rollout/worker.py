"""The child's side of an engine in a process of its own: `python -m lit_reason.rollout.worker CONNECTION MEMORY HOST`.

    parent                              child
    (1, "start", settings)      ->      host = HOST(**settings)
    (2, "load", version)        ->      host.load(iterator, version)
    (2, "tensors", places)      ->          the iterator's next tensors, in shared memory
                                <-      (2, "taken")
    (3, "generate", requests)   ->      host.generate(...)
                                <-      (3, "alive", progress)      after every step
                                <-      (3, "done", results)        or (3, "failed", error)

Calls are served one after the other, but for those that come while it generates: they are served between two steps, so
that weights can change in flight; whoever was running then must say so (`check_versions`). When the parent goes away,
however it does, the child and all that it started end.
Only the process that started the child can write to it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import mmap
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lit_reason.rollout.engine import Held, NextToken, Progress
from lit_reason.rollout.sampling import Sampling

_SET_PDEATHSIG = 1  # of prctl(2)


class Request(NamedTuple):
    """What a completion is made of, and the most tokens that it may have."""

    token_ids: tuple[int, ...]
    seed: int
    limit: int


@dataclass(frozen=True, slots=True)
class Generated:
    """A completion without its text; fields as in `lit_reason.types.Completion`, `experts_SLK` as an array."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    version: int
    switches: tuple[tuple[int, int], ...] = ()
    experts_SLK: np.ndarray | None = None


class Host(Protocol):
    """What runs in the child: an engine without records and text. With an attribute `in_flight = False` it is asked
    nothing while it generates."""

    def load(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Takes the weights and forgets everything that was computed with the old ones."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        alive: Callable[[Progress], None],
    ) -> list[Generated]:
        """Completes each; calls `alive` after every step."""
        ...

    def held(self) -> Mapping[str, Held]: ...

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a push lies: bytes from `start` of the shared memory, or a handle of CUDA's."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    handle: tuple[Any, Any] | None = None


class Mailbox:
    """Messages of the parent, read by a thread of their own, so that its end is noticed whatever the host does."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.calls: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]]] = queue.SimpleQueue()
        self.tensors: queue.SimpleQueue[tuple[int, Sequence[Place] | None]] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(os.getppid(),), daemon=True).start()

    def _read(self, parent: int) -> None:
        while True:
            try:
                # A fork of the parent that outlives it would hold the pipe open: its end is not the only sign.
                while not self.connection.poll(1.0):
                    if os.getppid() != parent:
                        raise EOFError
                number, kind, payload = self.connection.recv()
            except (EOFError, OSError):
                os.killpg(os.getpgid(0), signal.SIGKILL)  # its own group: `process` starts it as a session's leader
            if kind == "tensors":
                self.tensors.put((number, payload))
            else:
                self.calls.put((number, kind, payload))

    def send(self, number: int, kind: str, payload: Any = None) -> None:
        self.connection.send((number, kind, payload))


class Worker:
    """Serves the parent's calls."""

    def __init__(self, mailbox: Mailbox, memory: int, host: Callable[..., Host]) -> None:
        self.mailbox, self.memory, self.make_host = mailbox, memory, host
        self.host: Any = None

    def run(self) -> None:
        while True:
            self.serve(*self.mailbox.calls.get())

    def serve(self, number: int, kind: str, payload: tuple[Any, ...]) -> bool:
        """Whether it went well."""
        try:
            self.mailbox.send(number, "done", self._call(number, kind, payload))
            return True
        except Exception as error:
            said = (type(error).__name__, str(error), traceback.format_exc())
            self.mailbox.send(number, "failed", said)
            return False

    def _call(self, number: int, kind: str, payload: tuple[Any, ...]) -> Any:
        if kind == "start":
            self.host = self.make_host(**payload[0])
        elif kind == "load":
            self._load(number, *payload)
        elif kind == "generate":
            return self._generate(number, *payload)
        else:
            return getattr(self.host, kind)(*payload)

    def _load(self, number: int, version: int) -> None:
        tensors = self._received(number)
        self.host.load(tensors, version)
        if (left := next(tensors, None)) is not None:
            raise RuntimeError(f"it took only a part of the weights: {left[0]} and what follows were left")

    def _generate(self, number: int, *arguments: Any) -> list[Generated]:
        changes: list[tuple[int, int]] = []

        def alive(progress: Progress) -> None:
            self.mailbox.send(number, "alive", progress)
            while getattr(self.host, "in_flight", True) and not self.mailbox.calls.empty():
                call = self.mailbox.calls.get()
                if self.serve(*call) and call[1] == "load":
                    changes.append((call[2][0], progress.total - progress.done))

        found = self.host.generate(*arguments, alive)
        check_versions(found, changes)
        return found

    def _received(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a push, copied out of the shared memory, which the next ones overwrite."""
        while True:
            of, places = self.mailbox.tensors.get()
            if of != number:
                continue  # of a push whose host gave up
            if places is None:
                return
            yield from list(unpacked(places, self.memory))
            self.mailbox.send(number, "taken")


def check_versions(found: Sequence[Generated], changes: Sequence[tuple[int, int]]) -> None:
    """Every completion that was running when weights came must name them: RuntimeError if one does not.

    Args:
        changes: (version, number of completions that were running then) of each push while these were generated.
    """
    for version, running in changes:
        named = sum(version in (one.version, *(to for _, to in one.switches)) for one in found)
        if named < running:
            raise RuntimeError(
                f"the weights of version {version} came while {running} completions were being generated, and only "
                f"{named} say so: their tokens are of other weights than their versions tell"
            )


def packed(tensors: Iterable[tuple[str, Tensor]], memory: int) -> list[Place]:
    """Writes tensors into the shared memory; those on a GPU stay there and are named by a handle."""
    places, end, host = [], 0, []
    for name, tensor in tensors:
        if tensor.is_cuda:
            from torch.multiprocessing.reductions import reduce_tensor

            handle = reduce_tensor(tensor.contiguous())
            places.append(Place(name, tensor.dtype, tuple(tensor.shape), 0, handle))
            continue
        places.append(Place(name, tensor.dtype, tuple(tensor.shape), end))
        host.append((end, tensor))
        end += -(-tensor.nbytes // 64) * 64
    if end > os.fstat(memory).st_size:
        os.ftruncate(memory, end)
    if end:
        with mmap.mmap(memory, end) as shared:
            for start, tensor in host:
                raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                shared[start : start + raw.numel()] = memoryview(raw.numpy())
    return places


def unpacked(places: Sequence[Place], memory: int) -> Iterator[tuple[str, Tensor]]:
    """What `packed` wrote, as tensors with memory of their own."""
    size = os.fstat(memory).st_size
    with mmap.mmap(memory, size, access=mmap.ACCESS_READ) if size else mmap.mmap(-1, 1) as shared:
        for place in places:
            if place.handle is not None:
                rebuild, arguments = place.handle
                here = (*arguments[:6], torch.cuda.current_device(), *arguments[7:])  # this process sees one device
                yield place.name, rebuild(*here).clone()
                continue
            nbytes = int(np.prod(place.shape)) * place.dtype.itemsize
            raw = bytearray(shared[place.start : place.start + nbytes])
            flat = torch.frombuffer(raw, dtype=place.dtype) if raw else torch.empty(0, dtype=place.dtype)
            yield place.name, flat.view(place.shape)


def main() -> None:
    connection, memory, host = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # `process` asks for the stacks of a host that stalls
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    # While it is stopped it cannot see its parent end: the kernel is to wake it then.
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGCONT)
    mailbox = Mailbox(Connection(connection))
    module, _, name = host.partition(":")
    Worker(mailbox, memory, getattr(importlib.import_module(module), name)).run()


if __name__ == "__main__":
    main()
