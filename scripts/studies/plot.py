"""Curves over steps, one per arm: mean over seeds, and the 95% interval as a band."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_reason.report.picture import COLOURS, GREY, rolling_mean
from studies.stats import t_interval

Curves = Mapping[int, Sequence[float]]  # {seed: one value per step}


def band(
    ax: Axes,
    arms: Mapping[str, Curves],
    window: int = 1,
    colours: Sequence[str] = COLOURS,
    x: Sequence[Sequence[float]] | None = None,
) -> None:
    """Draw each arm's mean and interval; `window` steps are averaged before anything else.

    Args:
        x: where each arm's steps lie; their numbers if None.
    """
    for i, ((name, curves), colour) in enumerate(zip(arms.items(), colours, strict=False)):
        smooth = [rolling_mean(np.asarray(curve, dtype=np.float64), window) for curve in curves.values()]
        mean, low, high = zip(*(t_interval(values) for values in zip(*smooth, strict=True)), strict=True)
        steps = range(1, len(mean) + 1) if x is None else x[i]
        ax.plot(steps, mean, color=colour, label=name, linewidth=1.4)
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def difference_band(ax: Axes, ours: Curves, others: Mapping[str, Curves], window: int = 1) -> None:
    """Draw ours minus each other arm, seed by seed, in the colours that `band` gave those that follow ours."""
    differences = {
        name: {seed: np.subtract(ours[seed], theirs[seed]).tolist() for seed in theirs}
        for name, theirs in others.items()
    }
    band(ax, differences, window, COLOURS[1:])
    ax.axhline(0, color=GREY, linewidth=0.8, linestyle="--")


def tidy(ax: Axes, title: str, xlabel: str = "") -> None:
    """Plain axes with a small title."""
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(xlabel, fontsize=8, color=GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=GREY)


def save_svg(figure: Figure, path: Path) -> None:
    """The same figure gives the same file: no date, no random ids; text stays text."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    # a hundredth of a point is far below a pixel, and half the file
    path.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", file.getvalue()), encoding="utf-8")
