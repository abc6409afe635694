"""How one case of bench_kernels.py is measured: ours and its rivals in turn, then the result against a reference.

Every repetition of a side is preceded by a write of 1 GiB, which empties the L2 cache, and a wait of about 2 ms on the
GPU, in which Python enqueues what is timed; CUDA events stand around that alone. The order of the sides turns round
with every repetition.

Needs torch and triton only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bench.kernels_compare import Checks, closeness, same

FLUSH = 1 << 30  # bytes
WAIT = 4_000_000  # cycles
COPIED = 1 << 30  # bytes of the copy whose bandwidth is the measure of others
LEAST, MOST = 5, 60  # repetitions
OURS, COPY = "triton", "copy"  # names of sides

Run = Callable[[], Any]
Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where it runs, and the backends that "ours" are: on a CPU (--dry-run) torch, and emulated products."""

    device: torch.device
    ours: str
    product: str

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


GPU = Place(torch.device("cuda"), "triton", "triton")
CPU = Place(torch.device("cpu"), "torch", "emulate")


@dataclass
class Made:
    """A case with its inputs.

    Attributes:
        sides: what is timed, by name; "triton" is ours, "torch" what `dispatch` would run instead of it.
        reference: what the result of ours is compared with, by `check`; None: with nothing.
        bytes: that must move, every input read once and every result written once; 0 where arithmetic is the bound.
        flops: 2 M N K of every product.
        memory: whether peaks are measured too.
    """

    sides: dict[str, Run]
    reference: Run | None = None
    check: Callable[[Any, Any], Checks] = closeness
    bytes: int = 0
    flops: int = 0
    memory: bool = False


class Case(NamedTuple):
    """A measurement that is yet to be made.

    Attributes:
        kind: which of its group's, e.g. "backward"; targets look for group and kind.
        make: `make(place, *shape)`.
        op: of `dispatch`, if the sides "torch" and "triton" are its two ways at `dispatched`; the times of cases with
            one op and shape, e.g. forward and backward, are added up.
        judged: whether targets count it.
    """

    group: str
    kind: str
    shape: Shape
    make: Callable[..., Made]
    op: str = ""
    dispatched: Shape = ()
    judged: bool = True

    def row(self) -> dict[str, Any]:
        """What is known before."""
        row = {"group": self.group, "kind": self.kind, "shape": list(self.shape), "judged": self.judged, "sides": {}}
        return row | ({"op": self.op, "dispatched": list(self.dispatched)} if self.op else {})


class Kind(NamedTuple):
    """Cases that differ in shape.

    Attributes:
        shapes: that targets judge.
        more: for `dispatch`'s table, or as controls.
        tiny: for --dry-run.
        dispatched: the shape as `dispatch` gets it, of a case's.
    """

    name: str
    make: Callable[..., Made]
    op: str
    shapes: Sequence[Shape]
    more: Sequence[Shape]
    tiny: Shape
    dispatched: Callable[..., Shape] = lambda *shape: shape

    def cases(self, group: str, dry: bool) -> list[Case]:
        shapes = [self.tiny] if dry else [*self.shapes, *self.more]
        return [
            Case(group, self.name, shape, self.make, self.op, self.dispatched(*shape), dry or shape in self.shapes)
            for shape in shapes
        ]


def ways(run: Callable[[str], Any], ours: str) -> dict[str, Run]:
    """`run(backend)` by ours and by torch."""
    return {OURS: lambda: run(ours), "torch": lambda: run("torch")}


def measure(case: Case, place: Place, seconds: float) -> dict[str, Any]:
    """The row of a case: its sides' times (ms), GB/s or TFLOP/s, and checks. A side that fails has its error instead.

    Args:
        seconds: for the repetitions of all sides together.

    Raises:
        RuntimeError: the GPU answers nothing any more.
    """
    torch.manual_seed(0)
    made = case.make(place, *case.shape)
    sides, row = dict(made.sides), case.row()
    if made.bytes:
        sides[COPY] = copying(place)
    for name, run in sides.items():
        row["sides"][name] = {"error": error} if (error := warmed_up(name, run, place)) else {}
    sides = {name: run for name, run in sides.items() if not row["sides"][name]}
    for name, ms in interleaved(sides, place, seconds).items():
        moved, flops = (2 * _copied(place), 0) if name == COPY else (made.bytes, made.flops)
        row["sides"][name] = summary(ms, moved, flops)
        if made.memory:
            row["sides"][name]["peak_mib"] = peak_memory(sides[name], place)
    if OURS in sides:
        try:
            row["checks"] = checks(made)
        except Exception as error:  # such as a reference that does not fit the memory
            row["checks"] = {"error": described(error)}
            wait(place)
    return row


def checks(made: Made) -> Checks:
    """`repeats`: whether a second run has the same bits; and what `made.check` says."""
    result = made.sides[OURS]()
    found: Checks = {"repeats": same(result, made.sides[OURS]())}
    return found | (made.check(result, made.reference()) if made.reference else {})


def warmed_up(name: str, run: Run, place: Place) -> str:
    """The error, if there is one. Raises RuntimeError if it took the GPU along."""
    try:
        for _ in range(3):
            run()
            wait(place)
    except Exception as error:  # whatever it is, it is that side's result
        try:
            wait(place)
        except RuntimeError as dead:
            raise RuntimeError(f"{name}: {described(error)}") from dead
        return described(error)
    return ""


def interleaved(sides: Mapping[str, Run], place: Place, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each repetition of each side, in turn."""
    start = time.perf_counter()
    one_round(sides, place)
    took = time.perf_counter() - start
    repetitions = min(max(int(seconds / max(took, 1e-4)), LEAST), MOST) if place.is_gpu else 1
    rounds = [one_round(dict(list(sides.items())[:: (-1) ** i]), place) for i in range(repetitions)]
    return {name: [one[name] for one in rounds] for name in sides}


def one_round(sides: Mapping[str, Run], place: Place) -> dict[str, float]:
    """Milliseconds of each."""
    if not place.is_gpu:
        return {name: _on_cpu(run) for name, run in sides.items()}
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in sides}
    flush = torch.empty(FLUSH, dtype=torch.int8, device=place.device)
    for name, run in sides.items():
        flush.zero_()
        torch.cuda._sleep(WAIT)
        events[name][0].record()
        run()
        events[name][1].record()
    wait(place)  # once a round: Python may run ahead of the GPU, by results that fit its memory
    return {name: first.elapsed_time(last) for name, (first, last) in events.items()}


def _on_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def summary(ms: Sequence[float], moved: int, flops: int) -> dict[str, Any]:
    median = statistics.median(ms)
    side: dict[str, Any] = {"ms": {"median": median, "min": min(ms), "max": max(ms)}, "repetitions": len(ms)}
    if moved:
        side["gb_per_s"] = moved / median / 1e6
    if flops:
        side["tflop_per_s"] = flops / median / 1e9
    return side


def copying(place: Place) -> Run:
    """A copy whose bytes per second, read and written, are the copy bandwidth."""
    source = torch.empty(_copied(place), dtype=torch.uint8, device=place.device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _copied(place: Place) -> int:
    return COPIED if place.is_gpu else 1 << 10


def peak_memory(run: Run, place: Place) -> float:
    """MiB above what was allocated before, results included; 0 on a CPU."""
    if not place.is_gpu:
        return 0.0
    wait(place)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait(place)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def described(error: BaseException) -> str:
    """`ValueError: its first line`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def wait(place: Place) -> None:
    if place.is_gpu:
        torch.cuda.synchronize()
