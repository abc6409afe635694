"""What the study of FP8 in pretraining measures, and its table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.stats import Interval, t_interval

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "fp8_pretraining.json"
BOUND = 0.0025  # of the relative difference (2412.19437 section 3.3)
TAIL = 100  # steps whose mean loss is a run's figure
WARMUP = 50  # steps before which the loss falls too fast to compare

Losses = Mapping[str, Mapping[int, Sequence[float]]]  # {arm: {seed: one number per step}}; the first arm is the base


def summary(losses: Losses) -> dict[str, Any]:
    """Of each arm: the mean loss of the last steps; against the first arm, seed by seed, the relative difference there
    and the largest of any window of as many steps, in absolute value."""
    base, found = next(iter(losses.values())), {}
    for arm, runs in losses.items():
        ends = {seed: statistics.fmean(run[-TAIL:]) for seed, run in runs.items()}
        found[arm] = {"loss": t_interval(list(ends.values()))._asdict()}
        if runs is not base:
            relative = [(ends[seed] / statistics.fmean(base[seed][-TAIL:])) - 1 for seed in runs]
            found[arm]["relative"] = t_interval(relative)._asdict()
            found[arm]["largest"] = max(largest_difference(runs[seed], base[seed]) for seed in runs)
    return found


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """max over windows of TAIL steps, after the warm-up, of |mean(ours) / mean(theirs) - 1|."""
    ends = range(WARMUP + TAIL, len(ours) + 1)
    return max(abs(statistics.fmean(ours[e - TAIL : e]) / statistics.fmean(theirs[e - TAIL : e]) - 1) for e in ends)


def pretraining_table() -> str:
    if not RECORD.is_file():
        return "Not measured yet."
    record = json.loads(RECORD.read_text())
    lines = [
        f"| rate | | loss, last {TAIL} steps | minus bfloat16's | largest of any {TAIL} steps | within {BOUND:.2%} |",
        "|---|---|---|---|---|---|",
    ]
    for rate, found in record["summary"].items():
        for arm, row in found.items():
            seeds = ", ".join(map(str, record["settings"]["seeds"][rate]))
            cells = [f"{rate}, seeds {seeds}" if arm == next(iter(found)) else "", arm]
            cells += [read(row["loss"]).text(".4f"), "", "", ""]
            if "relative" in row:
                relative = Interval(*(100 * value for value in read(row["relative"])))
                cells[3:] = f"{relative.text('+.3f')} %", f"{row['largest']:.3%}", verdict(relative, 100 * BOUND)
            lines.append(f"| {' | '.join(cells)} |")
    settings = record["settings"]
    return "\n".join([
        *lines, "",
        f"{settings['steps']} steps; 95% intervals over seeds; "
        f"{record['machine']['device']}, torch {record['versions']['torch']}, {record['date'][:10]}.",
    ])  # fmt: skip


def read(row: Mapping[str, float | None]) -> Interval:
    """JSON has null for an end that is not a number: there is one seed only."""
    ends = (row[key] for key in Interval._fields)
    return Interval(*(math.nan if end is None else end for end in ends))


def verdict(relative: Interval, bound: float) -> str:
    """Whether the whole interval lies within the bound, or beyond it."""
    if -bound < relative.low and relative.high < bound:
        return "yes"
    return "no" if relative.low > bound or relative.high < -bound else "not shown"
