"""The targets of kernels_targets.py as they stand, for the command line and for a page. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.kernels_targets import GPU, verdicts


def check(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], bool]:
    """A line per target and GPU, and whether none is missed. Targets are an H200's: others are not judged."""
    lines, judged = [], [record for record in records if GPU in record["gpu"]]
    for record in records:
        if record not in judged:
            lines.append(f"not judged  {record['gpu']}: the targets are an {GPU}'s")
    found = [(record["gpu"] if record else f"no {GPU}", verdicts(record)) for record in judged or [None]]
    lines += [
        f"{v.state:10}  {v.target.kernel}: {v.target.words}: {v.text}, {gpu}" for gpu, all_ in found for v in all_
    ]
    return lines, not any(v.state == "missed" for _, all_ in found for v in all_)


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The table of benchmarks/README.md."""
    judged = [record for record in records if GPU in record["gpu"]]
    record = judged[0] if judged else None
    lines = ["| kernel | target | measured |", "|---|---|---|"]
    kernel = ""
    for v in verdicts(record):
        text = v.state if v.state == "unmeasured" else f"{v.state}: {v.text}"
        words = v.target.words.replace("|", "\\|")
        lines.append(f"| {v.target.kernel if v.target.kernel != kernel else ''} | {words} | {text} |")
        kernel = v.target.kernel
    return "\n".join([*lines, "", *(source(record) for record in records)] if records else [*lines, "", NOTHING])


NOTHING = "Nothing is measured yet: no GPU was at hand. On one: `python scripts/bench_kernels.py`."


def source(record: Mapping[str, Any]) -> str:
    """GPU, versions and dates of a record, and its ceilings."""
    groups = record["groups"]
    dates = sorted({group["date"][:10] for group in groups.values()})
    versions = sorted({f"torch {v['torch']}, Triton {v['triton']}" for v in (g["versions"] for g in groups.values())})
    rows = [row for group in groups.values() for row in group["rows"]]
    limits = [
        f"{row['kind']} {name} {side['tflop_per_s']:,.0f} TFLOP/s" if "tflop_per_s" in side
        else f"{name} {side['gb_per_s']:,.0f} GB/s"
        for row in rows if row["group"] == "ceilings"
        for name, side in row["sides"].items() if "ms" in side
    ]  # fmt: skip
    text = f"{record['gpu']}, {'; '.join(versions)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    return text + (f" Ceilings there: {', '.join(limits)}." if limits else "")
