"""How one case of bench_kernels.py is measured: ours and its rivals in turn, then the result against a reference.

Every repetition of a side is preceded by a write of 1 GiB, which empties the L2 cache and keeps the GPU busy for some
0.3 ms while Python enqueues what is timed; CUDA events stand around that alone. The order of the sides turns round with
every repetition.

Needs torch and triton only."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLUSH = 1 << 30  # bytes
COPIED = 1 << 30  # bytes of the copy whose bandwidth is the measure of others
LEAST, MOST = 5, 60  # repetitions
CHUNK = 1 << 26  # numbers whose float64 sums are made at a time
OURS, COPY = "triton", "copy"  # names of sides

Run = Callable[[], Any]


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
        bytes: that must move, every input read once and every result written once; 0 where arithmetic is the bound.
        flops: 2 M N K of every product.
        against: a reference of ours: {name of a check: number or bool}.
        memory: sides whose peak memory is measured too.
    """

    sides: dict[str, Run]
    bytes: int = 0
    flops: int = 0
    against: Callable[[], dict[str, float | bool]] = dict
    memory: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A measurement that is yet to be made.

    Attributes:
        kind: which of its group's, e.g. "backward"; targets look for group and kind.
        make: `make(place, *shape)`.
        op: of `dispatch`, if the sides "torch" and "triton" are its two ways at `dispatched` (default: `shape`); the
            times of cases with one op and shape, e.g. forward and backward, are added up.
        judged: whether targets count it.
    """

    group: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[..., Made]
    op: str = ""
    dispatched: tuple[int, ...] = ()
    judged: bool = True

    @property
    def name(self) -> str:
        return f"{self.group}, {self.kind}, {'x'.join(map(str, self.shape))}"


def measure(case: Case, place: Place, seconds: float) -> dict[str, Any]:
    """The row of a case: its sides' times (ms), GB/s or TFLOP/s, and checks. A side that fails has its error instead.

    Args:
        seconds: for the repetitions of all sides together.

    Raises:
        RuntimeError: the GPU answers nothing any more.
    """
    torch.manual_seed(0)
    made = case.make(place, *case.shape)
    sides, moved = dict(made.sides), dict.fromkeys(made.sides, made.bytes)
    if made.bytes:
        sides[COPY], moved[COPY] = copying(place), 2 * _copied(place)
    row = {"group": case.group, "kind": case.kind, "shape": list(case.shape), "judged": case.judged}
    if case.op:
        row |= {"op": case.op, "dispatched": list(case.dispatched or case.shape)}
    found = warm_up(sides, place)
    times = interleaved({name: sides[name] for name, first in found.items() if isinstance(first, float)}, place, seconds)
    row["sides"] = {name: {"error": first} for name, first in found.items() if isinstance(first, str)}
    row["sides"] |= {name: _side(ms, moved[name], made.flops if name != COPY else 0) for name, ms in times.items()}
    for name in made.memory:
        if name in times:
            row["sides"][name]["peak_mib"] = peak_memory(sides[name], place)
    if OURS in times:
        row["checks"] = {"repeats": same(sides[OURS](), sides[OURS]()), **made.against()}
    return row


def warm_up(sides: Mapping[str, Run], place: Place) -> dict[str, float | str]:
    """Seconds of a run after two others, or the error."""
    found: dict[str, float | str] = {}
    for name, run in sides.items():
        try:
            for _ in range(3):
                start = time.perf_counter()
                run()
                _wait(place)
                found[name] = time.perf_counter() - start
        except Exception as error:  # whatever it is, it is that side's result
            found[name] = described(error)
            try:
                _wait(place)
            except RuntimeError as dead:
                raise RuntimeError(f"{name}: {found[name]}") from dead
    return found


def interleaved(sides: Mapping[str, Run], place: Place, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each repetition of each side, in turn."""
    start = time.perf_counter()
    times = _round(sides, place, list(sides))
    took = time.perf_counter() - start
    repetitions = min(max(int(seconds / max(took, 1e-4)), LEAST), MOST) if place.is_gpu else 1
    rounds = [_round(sides, place, list(sides)[:: (-1) ** i]) for i in range(repetitions)]
    times = {name: [_milliseconds(one[name]) for one in rounds] for name in times}
    return times


def _round(sides: Mapping[str, Run], place: Place, order: list[str]) -> dict[str, Any]:
    """One repetition of each. On a GPU pairs of events, read by `_milliseconds`."""
    found = {}
    flush = torch.empty(FLUSH if place.is_gpu else 1, dtype=torch.int8, device=place.device)
    for name in order:
        flush.zero_()
        if not place.is_gpu:
            start = time.perf_counter()
            sides[name]()
            found[name] = 1e3 * (time.perf_counter() - start)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        sides[name]()
        last.record()
        found[name] = first, last
    _wait(place)  # or Python runs ahead of the GPU by all repetitions, whose results then wait for their memory
    return found


def _milliseconds(one: Any) -> float:
    return one if isinstance(one, float) else one[0].elapsed_time(one[1])


def _side(ms: list[float], moved: int, flops: int) -> dict[str, Any]:
    median = statistics.median(ms)
    side: dict[str, Any] = {"ms": {"median": median, "min": min(ms), "max": max(ms)}, "repetitions": len(ms)}
    if moved:
        side["gb_per_s"] = moved / median / 1e6
    if flops:
        side["tflop_per_s"] = flops / median / 1e9
    return side


def copying(place: Place) -> Run:
    """A copy whose bytes per second, read and written, are the copy bandwidth."""
    source = torch.empty(_copied(place), dtype=torch.int8, device=place.device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _copied(place: Place) -> int:
    return COPIED if place.is_gpu else 1 << 10


def peak_memory(run: Run, place: Place) -> float:
    """MiB above what was allocated before, results included; 0 on a CPU."""
    if not place.is_gpu:
        return 0.0
    _wait(place)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    _wait(place)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def described(error: BaseException) -> str:
    """`ValueError: its first line`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def tensors(result: Any) -> list[Tensor]:
    """Of nested tuples, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [one for part in result or () for one in tensors(part)]


def same(a: Any, b: Any) -> bool:
    """Whether all bits of two results are."""
    ours, theirs = tensors(a), tensors(b)
    return len(ours) == len(theirs) and all(_same(x, y) for x, y in zip(ours, theirs, strict=True))


def _same(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    chunks = zip(_chunks(x), _chunks(y), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in chunks)


def closeness(result: Any, reference: Any) -> dict[str, float | bool]:
    """Of the worst tensor: `diff` = 1 - 2<x,y> / (|x|^2 + |y|^2), `sqnr` = 10 log10(|x|^2 / |x - y|^2) dB of result y
    and reference x. NaN where either has one."""
    pairs = list(zip(tensors(result), tensors(reference), strict=True))
    each = [_closeness(y, x) for y, x in pairs]
    return {"diff": _worst(max, [one[0] for one in each]), "sqnr": _worst(min, [one[1] for one in each])}


def _closeness(y: Tensor, x: Tensor) -> tuple[float, float]:
    xx = yy = xy = error = 0.0
    if x.shape != y.shape:
        return math.nan, math.nan
    for a, b in zip(_chunks(x), _chunks(y), strict=True):
        a, b = a.double(), b.double()
        sums = torch.stack([a @ a, b @ b, a @ b, (a - b) @ (a - b)]).tolist()
        xx, yy, xy, error = (total + one for total, one in zip((xx, yy, xy, error), sums, strict=True))
    if math.isnan(error):
        return math.nan, math.nan
    return 1 - 2 * xy / (xx + yy) if xx + yy else 0.0, 10 * math.log10(xx / error) if xx and error else math.inf


def _worst(of: Callable[[list[float]], float], values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else of(values)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.detach().contiguous().view(-1).split(CHUNK)


def _wait(place: Place) -> None:
    if place.is_gpu:
        torch.cuda.synchronize()
