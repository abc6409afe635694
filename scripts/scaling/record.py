"""Where and with what a measurement was made, and how its files are written."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_reason.errors import LitReasonError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "mup"


def run(main: Callable[[], int | None]) -> None:
    """A script's `main`; what a user can mend is one line, without the way there."""
    try:
        sys.exit(main())
    except LitReasonError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def circumstances(device: str) -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": {
            "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "platform": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "lit_reason": version("lit-reason"),
        },
    }


def _processor() -> str:
    names = (line.split(":", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    return next(names, platform.processor() or "unknown").strip()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Six digits of every number; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure that needs no display."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
