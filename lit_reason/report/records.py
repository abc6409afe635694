"""Records of a run as JSON lines, kept consistent with resume.

A run that resumes at optimizer step s will do step s again, so rows with `step >= s` are dropped first; a run that
starts at step 0 beside older records sets those aside under another name and deletes nothing.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lit_reason.errors import DataError

STEPS = "metrics/steps.jsonl"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines whole or not at all: temporary file in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON line; a crash in the middle leaves a torn last line, which `read_rows` skips."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; a torn last line is left out, a torn line elsewhere is an error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}:{number} is not JSON ({error}); move the file away and resume") from error
    return rows


def set_aside(path: Path) -> Path | None:
    """Rename an existing file or folder `x.ext` to the first free `x.old-N.ext`; None if there is nothing."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    number = 1
    while (free := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    path.rename(free)
    return free


def begin_file(path: Path, step: int) -> None:
    """Make a JSON-lines file ready for a run whose next optimizer step is `step`."""
    if step == 0:
        set_aside(path)
    elif path.exists():
        write_rows(path, (row for row in read_rows(path) if row["step"] < step))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The per-step metrics of a run directory: `metrics/steps.jsonl`, else a CSVLogger's newest `metrics.csv`."""
    own = run_dir / STEPS
    if own.exists():
        return read_rows(own)
    tables = sorted(run_dir.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not tables:
        raise DataError(f"{run_dir} holds neither {STEPS} nor a metrics.csv; is it a run directory?")
    steps: dict[int, dict[str, Any]] = {}
    with tables[-1].open(encoding="utf-8", newline="") as file:
        # the CSVLogger writes train and validation metrics of one step on separate lines, with holes
        for line in csv.DictReader(file):
            row = {name: float(value) for name, value in line.items() if value}
            step = int(row.pop("step"))
            steps.setdefault(step, {"step": step}).update(row)
    return [steps[step] for step in sorted(steps)]


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The scalar entries as plain floats; what is not finite is left out (JSON has no NaN)."""
    floats = {name: float(value) for name, value in values.items()}
    return {name: value for name, value in floats.items() if math.isfinite(value)}
