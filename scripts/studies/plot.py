"""Curves over steps, one per arm: mean over seeds, and the 95% interval as a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_reason.report.picture import COLOURS, GREY, rolling_mean
from studies.stats import t_interval


def band(ax: Axes, arms: Mapping[str, Sequence[Sequence[float]]], window: int = 1) -> None:
    """Draw each arm's curves, `{arm: [one curve per seed]}`; `window` steps are averaged before anything else."""
    for (name, curves), colour in zip(arms.items(), COLOURS, strict=False):
        smooth = [rolling_mean(np.asarray(curve, dtype=np.float64), window) for curve in curves]
        mean, low, high = zip(*(t_interval(values) for values in zip(*smooth, strict=True)), strict=True)
        steps = range(1, len(mean) + 1)
        ax.plot(steps, mean, color=colour, label=name, linewidth=1.4)
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def tidy(ax: Axes, title: str, xlabel: str = "") -> None:
    """Plain axes with a small title."""
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(xlabel, fontsize=8, color=GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=GREY)


def save_svg(figure: Figure, path: Path) -> None:
    """The same figure gives the same file: no date, no random ids; text stays text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
