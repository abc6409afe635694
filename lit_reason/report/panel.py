"""The last words of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_reason.report.metrics import out_of_range
from lit_reason.report.picture import reward_names


def first_and_last(records: Sequence[Mapping[str, Any]], name: str, part: int = 10) -> tuple[float, float] | None:
    """Mean of a metric over the first and over the last tenth of the run (at least one step)."""
    values = [float(r[name]) for r in records if r.get(name) is not None]
    if not values:
        return None
    size = max(1, len(values) // part)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def headline_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the end of a run is judged by: rewards first."""
    rewards = [f"reward/{name}/mean" for name in reward_names(records)]
    return [*rewards, "kl/k1", "entropy", "completion/length", "completion/truncated", "expert/max_violation"]


def panel(records: Sequence[Mapping[str, Any]], files: Sequence[Path] = (), title: str = "Training finished") -> Panel:
    """First tenth against last tenth of the run, values that left their healthy range, and where the files are.

    Print it with `rich.print(panel(records))`.
    """
    table = Table(box=None, pad_edge=False)
    for column in ("", "first tenth", "last tenth"):
        table.add_column(column, justify="right" if column else "left")
    for name in headline_names(records):
        if (ends := first_and_last(records, name)) is not None:
            table.add_row(name, *(f"{value:.3f}" for value in ends))
    lines: list[Any] = [table]
    for name, metric in out_of_range(records[-1] if records else {}).items():
        lines.append(Text(f"check {name} = {records[-1][name]:.4g}: {metric.action}", style="yellow"))
    lines += [Text(str(path), style="dim", no_wrap=True, overflow="ignore") for path in files]
    return Panel(Group(*lines), title=f"{title}, {len(records)} steps", title_align="left", expand=False)
