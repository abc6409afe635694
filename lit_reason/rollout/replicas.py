"""Several engines as one: each generates a share of the requests at the same time, every push goes to all.

    requests --cut--> share 0 -> engine 0 --.
                      share 1 -> engine 1 ---> completions, in the requests' order

On a CPU two processes of one thread make more tokens than one process of two: small products do not share well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TypeVar

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError, EngineDiedError, EngineStalledError, WeightSyncError
from lit_reason.rollout.engine import Held, NextToken, OnProgress, Progress
from lit_reason.rollout.hosted import HostedEngine
from lit_reason.rollout.sampling import Sampling
from lit_reason.types import Completion, Prompt

T = TypeVar("T")


class Replicas:
    """Engines of one kind, each in a process of its own.

    Example::

        engine = Replicas([BuiltinProcess(tokenizer, cores=[core]) for core in (0, 1)])
        lit-reason-train ... rollout=builtin_process rollout.replicas=2

    An engine that dies is started once more and proven alone; if that fails while all generate, all are ended.

    Raises:
        ConfigError: there is none; at the first push, several for a model on a GPU.
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
        if len(self.engines) > 1 and (device := next(model.parameters()).device).type != "cpu":
            raise ConfigError(
                f"rollout.replicas={len(self.engines)} for a model on {device}: replicas share a CPU's cores. Type "
                "rollout.replicas=1, or rollout=vllm_server with one of rollout.engine.urls per device"
            )
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
        for engine in self.engines:
            engine.check(prompts, sampling, seeds, limits)
        shares = cut(len(prompts), len(self.engines))
        told = None if progress is None else Together(shares, progress)

        def ask(engine: HostedEngine, i: int) -> list[Completion]:
            share, heard = shares[i], None if told is None else told.of(i)
            idx, most = (None if one is None else one[share] for one in (sample_idx, limits))
            return engine.generate(prompts[share], sampling, seeds[share], idx, heard, most) if prompts[share] else []

        return [completion for found in self._each(ask, end_all=True) for completion in found]

    def held(self) -> Mapping[str, Held]:
        """A tensor in which they differ once for each, under its name, "at" and the replica."""
        return agreed({f"replica {i}": held for i, held in enumerate(self._each(lambda engine, _: engine.held()))})

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        """Of all prompts what each replica says, one after another."""
        return [one for said in self._each(lambda engine, _: engine.next_token(prompts, top)) for one in said]

    def sleep(self, level: int = 1) -> None:
        self._each(lambda engine, _: engine.sleep(level))

    def wake(self) -> None:
        self._each(lambda engine, _: engine.wake())

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def _each(self, work: Callable[[HostedEngine, int], T], end_all: bool = False) -> list[T]:
        """`work` of all at the same time, in threads for which a process that ends does not wait.

        Args:
            end_all: if one is lost the others are ended, too, for nobody wants their long answers any more.
        """
        futures: list[Future[T]] = [Future() for _ in self.engines]

        def do(i: int) -> None:
            try:
                futures[i].set_result(work(self.engines[i], i))
            except BaseException as error:
                futures[i].set_exception(error)

        for i in range(len(futures)):
            threading.Thread(target=do, args=(i,), name=f"lit_reason replica {i}", daemon=True).start()
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in done if future.exception() is not None]
        if end_all and any(isinstance(future.exception(), EngineDiedError | EngineStalledError) for future in failed):
            self.close()
        wait(futures)
        for future in failed:  # what failed first, not what its end made fail
            future.result()
        return [future.result() for future in futures]


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
