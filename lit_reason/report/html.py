"""One HTML file that holds a whole run: picture, table, configuration. Nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from lit_reason.report.metrics import METRICS, out_of_range
from lit_reason.report.panel import first_and_last

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{color:#666;margin:.2rem 0 1rem}
img{width:100%;height:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.check td{background:#fff4d6}
pre{background:#f5f5f5;padding:1rem;overflow:auto;font-size:13px}
"""


def _rows(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table row per logged metric that the project documents, marked where the last value is out of range."""
    names = sorted({name for record in records for name in record})
    last = {name: next(r[name] for r in reversed(records) if r.get(name) is not None) for name in names}
    marked, rows = out_of_range(last), []
    for metric in METRICS:
        for name in names:
            ends = first_and_last(records, name) if metric.pattern.fullmatch(name) else None
            if ends is None:
                continue
            cells = "".join(f'<td class="n">{value:.4g}</td>' for value in (*ends, last[name]))
            advice = f"<b>check:</b> {escape(metric.action)}" if name in marked else escape(metric.healthy)
            row_class = ' class="check"' if name in marked else ""
            about = f'<td title="{escape(metric.meaning)}">{escape(name)}</td>'
            rows.append(f"<tr{row_class}>{about}{cells}<td>{advice}</td></tr>")
    return rows


def _facts(facts: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in facts.items() if not isinstance(value, Mapping)}
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in plain.items())
    return f"<h2>Result</h2><table>{rows}</table>" if rows else ""


def page(
    records: Sequence[Mapping[str, Any]],
    picture: bytes,
    *,
    title: str = "Training report",
    config: Mapping[str, Any] | str | None = None,
    summary: Mapping[str, Any] | None = None,
) -> str:
    """The HTML text.

    Args:
        records: as for `picture.draw`.
        picture: the bytes of its PNG.
        config: shown as YAML; a string is shown as it is.
        summary: the before/after numbers of an evaluation, if there are any.
    """
    text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False) if config else ""
    source = base64.b64encode(picture).decode()
    head = "<tr><th>metric</th><th>first tenth</th><th>last tenth</th><th>last step</th><th>healthy</th></tr>"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{len(records)} optimizer steps</p>",
        f'<img alt="training curves" src="data:image/png;base64,{source}">',
        _facts(summary or {}),
        f"<h2>Metrics</h2><table>{head}{''.join(_rows(records))}</table>",
        f"<h2>Configuration</h2><pre>{escape(text)}</pre>" if text else "",
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Write the page whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target
