"""An engine whose host runs in a process of its own, behind the engine protocol.

first push      start the process with the model's shape
every push      the export, some tensors at a time
generate        answers with deadlines; if the process dies or stalls: once more, in a new one, from the same seeds
sleep           gives its memory to the trainer; after level 2 it has no weights until the next push
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_reason.data.tokenizer import Tokenizer
from lit_reason.errors import ConfigError, EngineDiedError, EngineStalledError, RolloutError, WeightSyncError
from lit_reason.models import CausalLM
from lit_reason.models.checksum import digest
from lit_reason.rollout.engine import Held, NextToken, OnProgress, Progress, check_requests, most_tokens
from lit_reason.rollout.process import Deadlines, EngineProcess
from lit_reason.rollout.sampling import Sampling
from lit_reason.rollout.worker import Generated, Request
from lit_reason.types import Completion, Prompt

log = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class HostedEngine(ABC):
    """Base of the engines in a process of their own; a subclass names the host and says what it is told.

    Args:
        tokenizer: for the stop tokens and the completions' text.
        dtype: in which it computes.
        cores: the CPU cores that its process may use, e.g. [1]; all if None.
        deadlines: seconds by name (`Deadlines`).

    Attributes:
        recovered: called with itself, the model and its version when a new process has taken over the old one's
            weights.
    """

    HOST = ""
    in_flight = True  # weights can be pushed while it generates

    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: str = "bfloat16",
        cores: Sequence[int] | None = None,
        deadlines: Mapping[str, float] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"rollout.engine.dtype={dtype!r}: valid {', '.join(DTYPES)}")
        self.tokenizer, self.cores, self.deadlines = tokenizer, cores, Deadlines.named(deadlines)
        self._dtype = DTYPES[dtype]
        self._process: EngineProcess | None = None
        self._model: nn.Module | None = None
        self._pushed: dict[str, int] = {}  # digests of the last push, to know the same weights again
        self._context: int = 0
        self._versions: list[int] = []  # of every push that was begun
        self._asleep = 0
        self._version = -1
        self._lock = threading.RLock()  # of its process: a push and a generation may both find it dead
        self._closed = False
        self.recovered: Callable[[HostedEngine, nn.Module, int], object] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def process(self) -> EngineProcess:
        """Raises RolloutError before the first push."""
        if self._process is None:
            raise RolloutError("the engine has no weights yet: call engine.push(model, version) first")
        if self._asleep:
            raise RolloutError(f"the engine sleeps (level {self._asleep}): call engine.wake() first")
        return self._process

    def version(self) -> int:
        return self._version

    @property
    def sleeps(self) -> bool:
        """Whether its host can give its memory back."""
        return False

    @abstractmethod
    def settings(self, model: nn.Module) -> dict[str, Any]:
        """What the host's constructor gets."""

    def environment(self) -> dict[str, str]:
        """Variables of the host's process."""
        return {}

    @abstractmethod
    def prefix_block(self) -> int:
        """See `Provable`."""

    @abstractmethod
    def truth(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What it must hold of `model`; see `Provable`."""

    def export(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What a push sends."""
        return self.truth(model)

    def check_sampling(self, sampling: Sampling) -> None:  # noqa: B027 (most engines refuse none)
        """Raises ConfigError for settings with which its log-probs would not be those that a trainer computes."""

    def push(self, model: nn.Module, version: int) -> None:
        with self._lock:
            self._closed = False
            self._push(model, version)

    def _push(self, model: nn.Module, version: int) -> None:
        if self._process is None or not self._process.alive:
            self._start(model)
        if self._asleep:
            self.wake()
        self._model, self._pushed = model, {}
        self._versions.append(version)
        try:
            self.process.send("load", version, tensors=self._noting(model), silence_s=self.deadlines.push)
        except BaseException as error:
            self._end()  # it may hold half of them
            if isinstance(error, RolloutError) and not isinstance(error, EngineDiedError | EngineStalledError):
                raise WeightSyncError(f"the engine refused the weights of version {version}: {error}") from error
            raise
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`.

        Args:
            limits: the most tokens of each completion, where they differ; `sampling.max_tokens` holds as well.
        """
        self.check(prompts, sampling, seeds, limits)
        begun = len(self._versions) - 1
        most = most_tokens(prompts, sampling, self._context, limits)
        requests = [Request(p.token_ids, seed, limit) for p, seed, limit in zip(prompts, seeds, most, strict=True)]

        def ask(process: EngineProcess) -> list[Generated]:
            silence_s, heard = self.deadlines.generate, throttled(progress)
            return process.call("generate", requests, sampling, silence_s=silence_s, heard=heard)

        process = self.process
        try:
            found = ask(process)
        except (EngineDiedError, EngineStalledError) as error:
            self._recover(process, error)
            found = ask(self.process)
        check_known(found, self._versions[begun:])
        return completions_of(found, prompts, seeds, sample_idx, self.tokenizer)

    def check(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        limits: Sequence[int] | None = None,
    ) -> None:
        """RolloutError or ConfigError for what it could not generate, or not now."""
        if self.process and self._version < 0:
            raise RolloutError("the engine's weights were dropped by its sleep: call engine.push(model, version) first")
        check_requests(prompts, seeds, self._context, limits)
        self.check_sampling(sampling)

    def sleep(self, level: int = 1) -> None:
        """Gives memory back until `wake`: 1 keeps the weights on the host, 2 drops them, so that only a push, which
        also wakes it, brings them back."""
        if level not in (1, 2):
            raise RolloutError(f"got sleep(level={level}); valid: 1 keeps the weights, 2 drops them")
        self.process.call("sleep", level, silence_s=self.deadlines.push)
        self._asleep = level
        if level == 2:
            self._version, self._pushed = -1, {}

    def wake(self) -> None:
        self._asleep = 0
        self.process.call("wake", silence_s=self.deadlines.push)

    def held(self) -> Mapping[str, Held]:
        return self.process.call("held", silence_s=self.deadlines.push)

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        return self.process.call("next_token", [list(ids) for ids in prompts], top, silence_s=self.deadlines.push)

    def close(self) -> None:
        """Ends its process, and what another thread is generating with it; the next push starts another one."""
        self._closed = True
        if (process := self._process) is not None:
            process.close()  # before the lock: whoever holds it may be waiting for an answer
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        self._asleep, self._version = 0, -1
        if process is not None:
            process.close()

    def _start(self, model: nn.Module) -> None:
        self._end()
        self._context = int(cast(CausalLM, model).config.max_seq_len)
        settings = self.settings(model)
        self._process = EngineProcess(self.HOST, self.environment(), self.cores)
        if self._closed:  # between these lines
            self._process.close()
        self._process.start(settings, self.deadlines.start)

    def _noting(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.export(model):
            self._pushed[name] = digest(tensor)
            yield name, tensor

    def _recover(self, lost: EngineProcess, cause: Exception) -> None:
        """A new process with the weights of the old one: only possible while the policy has not moved on."""
        with self._lock:
            if self._closed:
                raise cause
            if self._process is not lost and self._process is not None and self._process.alive:
                return  # a push from another thread has replaced it
            log.warning("%s\nIt is started once more, and the same seeds are generated again.", cause)
            self._restart(cause)

    def _restart(self, cause: Exception) -> None:
        model, before, version = self._model, self._pushed, self._version
        assert model is not None
        if {name: digest(tensor) for name, tensor in self.export(model)} != before:
            raise RolloutError(
                f"the engine is gone, and the policy has moved on since its version {version}: the same completions "
                "cannot be generated again. The same command resumes from the last checkpoint"
            ) from cause
        self._push(model, version)
        if self.recovered is not None:
            self.recovered(self, model, version)


def throttled(progress: OnProgress | None) -> OnProgress | None:
    """Twice a second, as the builtin engine does; a host tells after every step."""
    last = 0.0

    def report(now: Progress) -> None:
        nonlocal last
        if progress is not None and (now.done == now.total or time.perf_counter() - last > 0.5):
            last = time.perf_counter()
            progress(now)

    return None if progress is None else report


def completions_of(
    found: Sequence[Generated],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sample_idx: Sequence[int] | None,
    tokenizer: Tokenizer,
) -> list[Completion]:
    """What was generated, with its text and the request that it answers."""
    idx = [0] * len(prompts) if sample_idx is None else sample_idx
    return [
        Completion(
            prompt.id,
            i,
            one.token_ids,
            one.logprobs,
            tokenizer.decode(list(one.token_ids[:-1] if one.stopped else one.token_ids)),
            "stop" if one.stopped else "length",
            one.version,
            seed,
            experts_SLK=None if one.experts_SLK is None else torch.from_numpy(one.experts_SLK),
            switches=one.switches,
        )
        for one, prompt, seed, i in zip(found, prompts, seeds, idx, strict=True)
    ]


def check_known(found: Sequence[Generated], versions: Sequence[int]) -> None:
    """RolloutError for a completion of a version that was not the engine's while it was generated."""
    said = {version for one in found for version in (one.version, *(to for _, to in one.switches))}
    if unknown := said - set(versions):
        raise RolloutError(
            f"the engine says that it generated with weights of version {', '.join(map(str, sorted(unknown)))}; "
            f"it had been given {', '.join(map(str, versions))}"
        )
