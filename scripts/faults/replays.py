"""The faults: what is broken, and what must happen.

Each is replayed inside a round of a real run: those of the weights before its push, those of the process after its
generation. It must end in the error that is named, or in the same completions as without it.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from faults.loop import Run
from lit_reason.errors import LitReasonError
from lit_reason.rollout.engine import Progress
from lit_reason.types import Completion

FURTHER = 1000  # added to a version for a push in the middle of its generation


@dataclass
class Outcome:
    """One replay."""

    fault: str
    injected: str
    dtype: str
    step: int
    caught: bool
    by: str
    error: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fault:
    """`act` breaks and lets the run go on; `says` is what the error must say, or what `act` returns."""

    name: str
    injected: str
    act: Callable[[Run], str | None]
    says: str
    by: str
    generates: bool = False

    def replay(self, run: Run, dtype: str) -> Outcome:
        began, error, found = time.perf_counter(), "", None
        try:
            found = self.act(run)
        except LitReasonError as raised:
            error = f"{type(raised).__name__}: {raised}"
        seconds = time.perf_counter() - began
        caught = re.search(self.says, error or found or "", re.DOTALL) is not None
        line = (error or found or "nothing was noticed").splitlines()[0]
        run.heal()
        return Outcome(self.name, self.injected, dtype, run.version, caught, self.by, line, seconds)


def pushed_with(fault: str, run: Run) -> None:
    run.engine.inject(fault)
    run.push()


def stale_wake(run: Run) -> None:
    run.engine.process.call("remember", silence_s=60)
    run.push()
    slept(run, "stale after sleep")


def slept(run: Run, fault: str) -> None:
    run.push()
    run.engine.inject(fault)
    run.proven.sleep(1)
    run.proven.wake()


def awake_without_weights(run: Run) -> None:
    run.proven.sleep(2)
    run.proven.wake()
    run.ask(None)


def in_flight(run: Run, fault: str = "") -> list[Completion]:
    """Other weights are pushed, and proven, while the round's completions are generated."""
    if fault:
        run.engine.inject(fault)
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []

    def push() -> None:
        try:
            run.proven.push(run.model, run.version + FURTHER)
        except LitReasonError as error:
            errors.append(error)

    def once(progress: Progress) -> None:
        if not threads:
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.mul_(1.01)
            threads.append(threading.Thread(target=push))
            threads[0].start()

    saved = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    try:
        found = run.ask(once)
    finally:
        for thread in threads:
            thread.join()
        run.model.load_state_dict(saved)
    if errors:
        raise errors[0]
    return found


def race(run: Run) -> str:
    """The honest engine: switches are told, and tokens before and after them are of the weights that they name."""
    found = in_flight(run)
    switched = [one for one in found if one.switches]
    worst = max(_gap(run, one, 1.01) for one in switched)
    wrong = max(_gap(run, one, 1.0) for one in switched)
    return f"{len(switched)} of {len(found)} switched, gap {worst:.2g}" if worst < wrong else f"gap {worst} {wrong}"


@torch.no_grad()
def _gap(run: Run, one: Completion, factor: float) -> float:
    """Mean |log p engine - trainer| over tokens after the switch, the trainer's parameters times `factor`."""
    prompt = next(prompt for prompt in run.prompts if prompt.id == one.prompt_id)
    model, at = run.model.eval(), one.switches[0][0]
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.mul_(factor)
    ids = torch.tensor([[*prompt.token_ids, *one.token_ids]])
    table = model(ids)[0].log_softmax(-1)[len(prompt.token_ids) - 1 : -1]
    model.load_state_dict(saved)
    expected = table.gather(1, torch.tensor(one.token_ids)[:, None])[at:, 0]
    return float((expected - torch.tensor(one.logprobs[at:])).abs().mean())


def interrupted(run: Run, sign: signal.Signals, moved: bool = False) -> str:
    """A signal to the engine's process after its first step; the same completions must come."""
    expected, pid, sent = run.ask(None), run.engine.process.pid, []

    def once(progress: Progress) -> None:
        if not sent:
            sent.append(time.perf_counter())
            os.kill(pid, sign)
            if moved:
                next(run.model.parameters()).data.mul_(1.5)

    try:
        found = run.ask(once)
    finally:
        if moved:
            next(run.model.parameters()).data.div_(1.5)
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, found, strict=True))
    restarted = run.engine.process.pid != pid
    return f"restarted once, proven, {same} of {len(expected)} completions the same" if restarted else "not noticed"


def starved(run: Run, fault: str, again: bool) -> None:
    run.engine.inject(fault)
    run.engine.fault_at_start = fault if again else ""
    run.ask(None)


CHECKSUMS, HOST = "checksums", "the host's error"
WRONG = r"WeightSyncError: .*does not hold the policy"
ALL_THE_SAME = r"restarted once, proven, (\d+) of \1 completions the same"
AT_PUSH = [
    Fault("skipped push", "push returns at once", partial(pushed_with, "skipped push"), WRONG, CHECKSUMS),
    Fault(
        "router bias forgotten",
        "every parameter but e_score_correction_bias (verl #5801)",
        partial(pushed_with, "no router bias"),
        WRONG + ".*e_score_correction_bias",
        CHECKSUMS,
    ),
    Fault(
        "router bias in bfloat16",
        "rounded on its way (Megatron #1482)",
        partial(pushed_with, "router bias in bfloat16"),
        WRONG + ".*e_score_correction_bias",
        CHECKSUMS,
    ),
    Fault(
        "skipped cache flush",
        "old keys and values stay (vLLM #9744)",
        partial(pushed_with, "no flush"),
        "WeightSyncError: .*prefix cache",
        "canaries in the cache",
    ),
    Fault(
        "swapped gate/up",
        "of expert 0 in every layer",
        partial(pushed_with, "swapped gate/up"),
        WRONG + r".*experts\.0\.",
        CHECKSUMS,
    ),
    Fault(
        "one expert missing",
        "expert 1 of every layer",
        partial(pushed_with, "one expert missing"),
        WRONG + r".*experts\.1\.",
        CHECKSUMS,
    ),
    Fault(
        "refused transfer",
        "the host raises in load",
        partial(pushed_with, "refused transfer"),
        "WeightSyncError: the engine refused",
        HOST,
    ),
    Fault(
        "stale after sleep",
        "waking brings weights of an older push (trl #5312)",
        stale_wake,
        "WeightSyncError: after its sleep",
        "checksums before and after the sleep",
    ),
    Fault(
        "sleep level 1 that drops",
        "acts like level 2",
        partial(slept, fault="sleep 1 drops"),
        "WeightSyncError: after its sleep",
        "checksums before and after the sleep",
    ),
]
AT_GENERATION = [
    Fault(
        "sleep level 2 without reload",
        "generation after waking, without a push",
        awake_without_weights,
        "RolloutError: the engine's weights were dropped",
        "the engine refuses",
    ),
    Fault(
        "hidden race",
        "a push between two steps that the completions do not tell",
        lambda run: str(in_flight(run, "hidden race")),
        r"RolloutError: .*came while \d+ completions were being generated",
        "versions against pushes",
    ),
    Fault(
        "engine killed",
        "SIGKILL while it generates",
        partial(interrupted, sign=signal.SIGKILL),
        ALL_THE_SAME,
        "its end, then a restart",
    ),
    Fault(
        "engine stopped",
        "SIGSTOP while it generates, deadline 5 s",
        partial(interrupted, sign=signal.SIGSTOP),
        ALL_THE_SAME,
        "its silence, then a restart",
    ),
    Fault(
        "killed, policy moved on",
        "SIGKILL, and the weights of its version are gone",
        partial(interrupted, sign=signal.SIGKILL, moved=True),
        "RolloutError: .*moved on",
        "digests of the last push",
    ),
    Fault(
        "out of memory",
        "allocates up to its limit (RLIMIT_AS)",
        partial(starved, fault="out of memory", again=False),
        "RolloutError: .*MemoryError",
        HOST,
    ),
    Fault(
        "out of memory, killed",
        "SIGKILL as the kernel sends, after the restart too",
        partial(starved, fault="killed for memory", again=True),
        "EngineDiedError: .*Out of memory",
        "its end, twice",
    ),
]
WITH_ADAPTERS = Fault(
    "adapters not delivered",
    "LoRA's base is pushed, without the adapters (verl #7495)",
    partial(pushed_with, "adapters not delivered"),
    WRONG,
    CHECKSUMS,
)
HONEST_RACE = Fault(
    "push during generation", "between two steps, told", race, r"\d+ of \d+ switched", "log-probs of both versions"
)
