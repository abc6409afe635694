"""What bench_kernels.py writes: `benchmarks/kernels/<gpu>.json`, and the table that lit_kernels' `dispatch` reads.

    {"gpu": name, "groups": {group: {"date", "commit", "versions", "clocks", "rows": [...]}}}

Groups may come from several runs, each with its own circumstances; a row's sides are of one run. Needs torch only."""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "kernels"
DIFF = 1e-3  # the most that 1 - 2<x,y> / (|x|^2 + |y|^2) may be
CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.limit": "power_limit_w", "power.draw": "power_w",
          "temperature.gpu": "celsius", "driver_version": "driver"}  # fmt: skip


def file_name(gpu: str) -> str:
    """`nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def circumstances(commit: str = "") -> dict[str, Any]:
    """Date, commit and versions.

    Args:
        commit: where the checkout is a copy without git.
    """
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit or _commit(),
        "versions": {
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "driver": clocks().get("driver"),
            "python": platform.python_version(),
        },
    }


def clocks() -> dict[str, Any]:
    """Of the GPU that torch takes, by nvidia-smi; empty where that is missing or says nothing."""
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    which = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else "--id=0"
    found = (_output([*query, which]) or _output(query)).splitlines()
    return dict(zip(CLOCKS.values(), map(str.strip, found[0].split(",")), strict=False)) if found else {}


def _commit() -> str:
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).strip()
    return head + ("+changes" if head and changed else "")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def records(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every GPU's."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def groups_so_far(path: Path) -> dict[str, Any]:
    """Of the file that is to be written, or of the committed one of the same name."""
    for one in (path, FOLDER / path.name):
        if one.is_file():
            return json.loads(one.read_text())["groups"]
    return {}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Five digits of every number; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(record), allow_nan=False)
    new = path.with_suffix(".new")  # a run that is stopped while it writes leaves the old file
    new.write_text(text.replace('{"group":', '\n{"group":').replace('"groups":', '\n"groups":') + "\n")
    new.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def dispatch_table(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{operation: [{"shape", "torch": ms, "triton": ms}, ...]} as `dispatch.table` has it for one GPU.

    Rows of one operation and shape (forward and backward) are added up. A way that failed in one of them is left out,
    and so is ours where its result was wrong.
    """
    sums: dict[tuple[str, tuple[int, ...]], dict[str, float]] = {}
    for row in (row for group in record["groups"].values() for row in group["rows"] if "op" in row):
        entry = sums.setdefault((row["op"], tuple(row["dispatched"])), {"torch": 0.0, "triton": 0.0})
        for way in entry:
            side = row["sides"].get(way, {})
            usable = "ms" in side and (way == "torch" or is_right(row))
            entry[way] += side["ms"]["median"] if usable else math.inf
    table: dict[str, list[dict[str, Any]]] = {}
    for (op, shape), entry in sums.items():
        times = {way: ms for way, ms in entry.items() if math.isfinite(ms)}
        if times:
            table.setdefault(op, []).append({"shape": list(shape), **times})
    return table


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether ours was checked and found right."""
    checks = row.get("checks", {"error": "unchecked"})
    if "error" in checks or not all(value for value in checks.values() if isinstance(value, bool)):
        return False
    diff = checks.get("diff", 0.0)
    return diff is not None and diff < DIFF  # null was not a number


def write_dispatch_table(path: Path, record: Mapping[str, Any]) -> None:
    """Into the file with the other GPUs' tables."""
    tables = json.loads(path.read_text()) if path.is_file() else {}
    write(path, {**tables, record["gpu"]: dispatch_table(record)})
