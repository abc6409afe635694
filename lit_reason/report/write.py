"""A run directory's picture and HTML page, from what the run left there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_reason.report import html, picture
from lit_reason.report.records import read_metrics


def write_report(
    run_dir: str | os.PathLike[str],
    *,
    records: Sequence[Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> tuple[Path, Path]:
    """Write `report.png` and `report.html` into a run directory; returns both paths.

    Example::

        png, page = write_report("runs/demo")

    Args:
        run_dir: the run; its `metrics/steps.jsonl` (or a CSVLogger's `metrics.csv`) gives the curves, its
            `config.yaml` and `summary.json`, where there are any, the rest of the page.
        records: instead of reading the metrics.
        config: shown when the run has no `config.yaml`.
        title: default: the directory's name.
    """
    folder = Path(run_dir)
    found = list(records) if records is not None else read_metrics(folder)
    name = title or folder.absolute().name
    png = picture.draw(found, folder / "report.png", title=name)
    config_file, summary_file = folder / "config.yaml", folder / "summary.json"
    shown = config_file.read_text(encoding="utf-8") if config_file.exists() else config
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.exists() else None
    page = html.page(found, png.read_bytes(), title=name, config=shown, summary=summary)
    return png, html.write(folder / "report.html", page)
