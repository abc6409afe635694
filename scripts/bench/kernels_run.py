"""Runs the cases of a group in a process of their own, so that a kernel that crashes or hangs costs one case.

    parent   starts a child  ->  waits for each row, with a limit  ->  the child died or is too slow: that is the row,
    child    case after case ->  sends each row                        and another child goes on behind that case

Needs torch and triton only."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.kernels_measure import CPU, GPU, Case, described, measure

Cases = Callable[[str, bool], Sequence[Case]]  # of a group; tiny ones or not

STARTING = 60.0  # seconds that a child may take more for its first case


def rows_of(
    cases: Cases, group: str, dry: bool, seconds: float, limit: float, target: Callable[..., None] | None = None
) -> Iterator[dict[str, Any]]:
    """A row per case, in order.

    Args:
        cases: a module's function, since a child imports it.
        limit: seconds until a case counts as hanging; the first of a child has `STARTING` more.
        target: what the child runs (tests).
    """
    todo, done = cases(group, dry), 0
    context = multiprocessing.get_context("spawn")
    while done < len(todo):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=target or _child, args=(theirs, cases, group, dry, seconds, done), daemon=True)
        child.start()
        theirs.close()
        extra, alive = STARTING, True
        while alive and done < len(todo):
            started = time.perf_counter()
            row, alive = _answer(ours, limit + extra, child)
            extra = 0.0
            row = row if alive else {**todo[done].row(), "error": row["error"]}
            yield row | {"took_s": time.perf_counter() - started}
            done += 1
        child.kill()
        child.join(30)


def _answer(ours: Connection, limit: float, child: Any) -> tuple[dict[str, Any], bool]:
    """A row, and whether the child can go on."""
    if not ours.poll(limit):
        return {"error": f"no answer within {limit:.0f} s"}, False
    try:
        row = ours.recv()
    except EOFError:
        child.join(10)
        return {"error": f"its process ended with exit code {child.exitcode}"}, False
    return row, "error" not in row


def _child(theirs: Connection, cases: Cases, group: str, dry: bool, seconds: float, first: int) -> None:
    """Ends after a case that failed as a whole: what it left behind on the GPU would be the next one's trouble."""
    for case in cases(group, dry)[first:]:
        try:
            row = measure(case, CPU if dry else GPU, seconds)
        except Exception as error:
            theirs.send({"error": described(error)})
            return
        theirs.send(row)
        gc.collect()  # a case may leave little room for the next
