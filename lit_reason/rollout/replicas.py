"""Several engines as one: each generates a share of the requests at the same time, every push goes to all.

    requests --cut--> share 0 -> engine 0 --.
                      share 1 -> engine 1 ---> completions, in the requests' order

On a CPU two processes of one thread make more tokens than one process of two: small products do not share well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError, EngineDiedError, EngineStalledError, WeightSyncError
from lit_reason.rollout.engine import Held, NextToken, OnProgress, Progress, check_requests
from lit_reason.rollout.hosted import HostedEngine
from lit_reason.rollout.sampling import Sampling
from lit_reason.types import Completion, Prompt

T = TypeVar("T")


class Replicas:
    """Engines of one kind, each in a process of its own.

    Example::

        engine = Replicas([BuiltinProcess(tokenizer, cores=[core]) for core in (0, 1)])
        lit-reason-train ... rollout=builtin_process rollout.replicas=2

    An engine that dies is started once more and proven alone; if that fails, all are ended.
    """

    def __init__(self, engines: Sequence[HostedEngine]) -> None:
        if not engines:
            raise ConfigError("Replicas needs at least one engine")
        self.engines = list(engines)

    @property
    def dtype(self) -> torch.dtype:
        return self.engines[0].dtype

    @property
    def in_flight(self) -> bool:
        return all(engine.in_flight for engine in self.engines)

    @property
    def sleeps(self) -> bool:
        return all(engine.sleeps for engine in self.engines)

    @property
    def recovered(self) -> Callable[[HostedEngine, nn.Module, int], object] | None:
        return self.engines[0].recovered

    @recovered.setter
    def recovered(self, call: Callable[[HostedEngine, nn.Module, int], object] | None) -> None:
        for engine in self.engines:
            engine.recovered = call

    def version(self) -> int:
        """-1 as soon as one has none."""
        return min(engine.version() for engine in self.engines)

    def prefix_block(self) -> int:
        return self.engines[0].prefix_block()

    def truth(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return self.engines[0].truth(model)

    def check_sampling(self, sampling: Sampling) -> None:
        self.engines[0].check_sampling(sampling)

    def push(self, model: nn.Module, version: int) -> None:
        self._each(lambda engine, _: engine.push(model, version))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `HostedEngine.generate`."""
        check_requests(prompts, seeds, limits=limits)
        shares = cut(len(prompts), len(self.engines))
        told = None if progress is None else Together(shares, progress)

        def ask(engine: HostedEngine, i: int) -> list[Completion]:
            share, heard = shares[i], None if told is None else told.of(i)
            idx, most = (None if one is None else one[share] for one in (sample_idx, limits))
            return engine.generate(prompts[share], sampling, seeds[share], idx, heard, most) if prompts[share] else []

        return [completion for found in self._each(ask) for completion in found]

    def held(self) -> Mapping[str, Held]:
        """A tensor in which they differ once for each, under its name, "at" and the replica."""
        return agreed({f"replica {i}": held for i, held in enumerate(self._each(lambda engine, _: engine.held()))})

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        """Each is asked for all; the i-th answer is that of the i-th replica, in turn."""
        said = self._each(lambda engine, _: engine.next_token(prompts, top))
        return in_turn({f"replica {i}": one for i, one in enumerate(said)})

    def sleep(self, level: int = 1) -> None:
        self._each(lambda engine, _: engine.sleep(level))

    def wake(self) -> None:
        self._each(lambda engine, _: engine.wake())

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def _each(self, work: Callable[[HostedEngine, int], T]) -> list[T]:
        """`work` of all at the same time. If one is gone, or Ctrl-C is pressed, the others are ended, too: nobody wants
        their answers."""
        with ThreadPoolExecutor(len(self.engines), thread_name_prefix="lit_reason replica") as pool:
            futures = [pool.submit(work, engine, i) for i, engine in enumerate(self.engines)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                return [future.result() for future in futures]
            except BaseException as error:
                if isinstance(error, EngineDiedError | EngineStalledError) or not isinstance(error, Exception):
                    self.close()
                raise


class Together:
    """The progress of all shares as one."""

    def __init__(self, shares: Sequence[slice], report: OnProgress) -> None:
        self._said = [Progress(0, share.stop - share.start, 0, 0.0) for share in shares]
        self._report, self._lock = report, threading.Lock()

    def of(self, i: int) -> OnProgress:
        def hear(progress: Progress) -> None:
            with self._lock:
                self._said[i] = progress
                done, total, tokens = (
                    sum(getattr(one, key) for one in self._said) for key in ("done", "total", "tokens")
                )
                self._report(Progress(done, total, tokens, max(one.seconds for one in self._said)))

        return hear


def cut(count: int, parts: int) -> list[slice]:
    """Even, in order: the samples of a prompt, which are neighbours, stay together but at a border."""
    return [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def agreed(by_place: Mapping[str, Mapping[str, Held]]) -> dict[str, Held]:
    """What all hold; a tensor in which they differ once for each, under its name, "at" and the place.

    Raises:
        WeightSyncError: not all have the same tensors.
    """
    (first_place, first), found = next(iter(by_place.items())), dict[str, Held]()
    for place, held in by_place.items():
        if uneven := sorted(held.keys() ^ first.keys()):
            raise WeightSyncError(f"{place} and {first_place} do not have the same tensors: {uneven[:8]}")
    for name, one in first.items():
        same = all(held[name] == one for held in by_place.values())
        found |= {name: one} if same else {f"{name} at {place}": held[name] for place, held in by_place.items()}
    return found


def in_turn(by_place: Mapping[str, Sequence[NextToken]]) -> list[NextToken]:
    """Of the i-th prompt what the i-th place said, in turn.

    Raises:
        WeightSyncError: only some of them took a prompt from their prefix cache.
    """
    answers: list[Any] = list(by_place.values())
    found = []
    for i in range(len(answers[0])):
        cached = {place: said[i].cached for place, said in by_place.items()}
        if len({count > 0 for count in cached.values()}) > 1:
            raise WeightSyncError(f"of a canary these took from their prefix caches, in tokens: {cached}")
        found.append(NextToken(answers[i % len(answers)][i].logprobs, max(cached.values())))
    return found
