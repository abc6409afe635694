"""Hosts for tests of `lit_reason.rollout.process`: a counter in the place of a language model."""

import os
import subprocess
import sys
import time

import torch

from lit_reason.rollout.engine import Progress
from lit_reason.rollout.worker import Generated


class Host:
    """Generates `seed` again and again, one token per step."""

    def __init__(self, greeting="hello"):
        self.greeting, self.version = greeting, -1
        self.tensors, self.limit, self.hides, self.running = [], None, False, []

    def load(self, tensors, version):
        if self.limit == 0:
            raise RuntimeError("no weights, thanks")
        self.tensors = []
        for name, tensor in tensors:
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            self.tensors.append((name, str(tensor.dtype), tuple(tensor.shape), raw))
            if len(self.tensors) == self.limit:
                break
        self.version = version
        for switches, tokens in self.running:
            switches.append((len(tokens), version))

    def generate(self, requests, sampling, *rest):
        steps, pause, alive = rest if len(rest) == 3 else (3, 0.0, *rest)
        first = self.version
        self.running = [([], []) for _ in requests]
        for step in range(steps):
            time.sleep(pause)
            for (_, tokens), (_, seed, _) in zip(self.running, requests, strict=True):
                tokens.append(seed)
            alive(Progress(len(requests) if step == steps - 1 else 0, len(requests), 0, 0.0))
        return [
            Generated(tuple(tokens), (0.0,) * steps, False, first, () if self.hides else tuple(switches))
            for switches, tokens in self.running
        ]

    def greet(self, whom):
        return f"{self.greeting} {whom}"

    def fail(self):
        raise KeyError("spoon")

    def unpicklable(self):
        return lambda: 0

    def loaded(self):
        return self.tensors

    def take_only(self, limit):
        self.limit = limit

    def hide_switches(self):
        self.hides = True

    def hang_here(self):
        time.sleep(1000)

    def leave(self, words):
        print(words, flush=True)
        os._exit(3)

    def grandchild(self):
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid

    def inheriting(self):
        """A child that holds every descriptor of its own open."""
        if (pid := os.fork()) == 0:
            time.sleep(1000)
        return pid

    def circumstances(self):
        return os.sched_getaffinity(0), os.environ.get("FOR_THE_CHILD")


class Remembering(Host):
    """Says what it was given; `sleep` and `wake` are written down. Ends in the way that it is told, once or always."""

    def __init__(self, marker="", always=False, **settings):
        super().__init__()
        self.marker, self.always, self.calls = marker, always, []

    def generate(self, requests, sampling, alive):
        if self.marker and (self.always or not os.path.exists(self.marker)):
            open(self.marker, "w").close()
            os.kill(os.getpid(), 9)
        return [
            Generated((seed, self.version, *ids), (0.0,) * (2 + len(ids)), seed % 2 == 0, self.version)
            for ids, seed, _ in requests
        ]

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake(self):
        self.calls.append("wake")

    def called(self):
        return self.calls


class Refusing(Remembering):
    def load(self, tensors, version):
        for i, _ in enumerate(tensors):
            if i == 1 and version == 1:
                raise MemoryError("no room")


class Mislabelling(Remembering):
    def generate(self, requests, sampling, alive):
        return [Generated((1,), (0.0,), False, self.version - 1) for _ in requests]


class Sleeping(Remembering):
    def generate(self, requests, sampling, alive):
        time.sleep(1000)


class Failing(Remembering):
    def generate(self, requests, sampling, alive):
        raise ValueError("no spoon")


class Starting(Remembering):
    def __init__(self, **settings):
        time.sleep(1000)
