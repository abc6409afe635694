"""Curves of a training run as one PNG; needs no display.

+---------------------------+------------+
|                           |  KL        |
|  one curve per reward     +------------+
|  (mean, interval band)    |  entropy   |
|                           +------------+
|                           |  length    |
+---------------------------+------------+
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lit_reason.errors import DataError

# Okabe and Ito's palette: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555")
GREY = "#666666"


def reward_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rewards in the records, in order of first appearance."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [k[len("reward/") : -len("/mean")] for k in keys if k.startswith("reward/") and k.endswith("/mean")]


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one metric, steps without it left out."""
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def rolling_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the last `window` values (of fewer at the start)."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def rolling_se(errors: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Standard error of that rolling mean when the steps are independent: sqrt(sum se^2) / w."""
    count = np.minimum(np.arange(1, errors.size + 1), window)
    return np.sqrt(np.maximum(rolling_mean(errors**2, window), 0) / count)


def standard_errors(records: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64] | None:
    """`<reward>/se` beside every value of `<reward>/mean`; a step without one takes its neighbour's."""
    key = name.removesuffix("/mean") + "/se"
    known = next((r[key] for r in records if r.get(key) is not None), None)
    if known is None:
        return None
    errors = []
    for record in records:
        known = record[key] if record.get(key) is not None else known
        if record.get(name) is not None:
            errors.append(known)
    return np.array(errors, dtype=np.float64)


def _curve(ax: Axes, records: Sequence[Mapping[str, Any]], name: str, label: str, colour: str, window: int) -> bool:
    """Draw one metric; False if the records do not have it."""
    steps, values = series(records, name)
    if not steps.size:
        return False
    smooth = rolling_mean(values, window)
    if window > 1:
        ax.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
    errors = standard_errors(records, name)
    if errors is not None:
        half = 1.96 * rolling_se(errors, window)
        ax.fill_between(steps, smooth - half, smooth + half, color=colour, alpha=0.18, linewidth=0)
    ax.plot(steps, smooth, color=colour, linewidth=1.8, label=f"{label}  {smooth[-1]:.3g}")
    return True


def _panel(ax: Axes, records: Sequence[Mapping[str, Any]], title: str, names: Mapping[str, str], window: int) -> None:
    pairs = zip(names.items(), COLOURS * (1 + len(names) // len(COLOURS)), strict=False)
    drawn = [_curve(ax, records, name, label, colour, window) for (name, label), colour in pairs]
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8, colors=GREY)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.margins(x=0.01)
    if any(drawn):
        ax.legend(fontsize=8, frameon=False, loc="best", handlelength=1.4)
    else:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=9)
        ax.set_yticks([])


def draw(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    window: int | None = None,
) -> Path:
    """Draw the curves of a run and return the picture's path.

    The thin line is each step's value, the bold line its mean over the last `window` steps, the band that mean's 95%
    interval; the band needs `reward/<name>/se`, the standard error over prompts, which the `Report` callback records.

    Args:
        records: one mapping per optimizer step with `"step"` and metric values (names of `report.metrics`).
        path: of the PNG; folders are made.
        title: shown above everything.
        window: steps of the rolling mean; None: a twentieth of the run, at most 25.
    """
    if not records:
        raise DataError("nothing to draw: 0 records; the run logged no metric (set log_every_n_steps=1)")
    steps = len(records)
    window = window or max(1, min(25, steps // 20))
    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 3)
    rewards = {f"reward/{name}/mean": name for name in reward_names(records)}
    main = figure.add_subplot(grid[:, :2])
    _panel(main, records, "Reward, mean over the step's completions", rewards, window)
    main.set_xlabel("optimizer step", fontsize=9, color=GREY)
    side = (
        ("KL to the reference (nats per token)", {"kl/k1": "k1", "kl/k3": "k3"}),
        ("Entropy (nats per token)", {"entropy": "entropy"}),
        ("Completion length (tokens)", {"completion/length": "length"}),
    )
    for row, (heading, names) in enumerate(side):
        ax = figure.add_subplot(grid[row, 2], sharex=main)
        _panel(ax, records, heading, names, window)
        if row < 2:
            ax.tick_params(labelbottom=False)
    figure.axes[-1].set_xlabel("optimizer step", fontsize=9, color=GREY)
    bold = f"bold: mean of {window} steps; numbers: its last value" if window > 1 else "numbers: last value"
    banded = any(key.endswith("/se") for record in records for key in record)
    note = bold + ("; band: 95% interval over prompts" if banded else "")
    figure.suptitle(title or "Training curves", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=GREY)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, target)
    return target
