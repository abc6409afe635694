"""Write the README's generated tables: metrics from `lit_reason.report.metrics`, speed from the newest benchmark file.

python scripts/readme_tables.py            # rewrite README.md
python scripts/readme_tables.py --check    # exit 1 when it is out of step
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_reason.report.metrics import markdown_table

ROOT = Path(__file__).resolve().parent.parent


def spread(values: dict[str, float], digits: int) -> str:
    """`1.50 (1.48 to 1.61)`: median, least and greatest."""
    median, low, high = (f"{values[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def speed_table(record: dict[str, Any]) -> str:
    """The benchmark file as a table; medians over runs, with the extremes."""
    summary, machine, work = record["summary"], record["machine"], record["work"]
    rows = [
        ("completion tokens/s", "tokens_per_s", 0),
        ("step (s)", "step_s", 2),
        ("of it generation (s)", "generate_s", 2),
        ("peak memory (MiB)", "peak_rss_mib", 0),
    ]
    lines = ["| | lit_reason | TRL |", "|---|---|---|"]
    for label, key, digits in rows:
        ours, theirs = (spread(summary[side][key], digits) for side in ("lit_reason", "trl"))
        lines.append(f"| {label} | {ours} | {theirs} |")
    versions = record["runs"]["trl"][0]["versions"]
    lines += [
        "",
        f"Tokens/s over TRL's: **{spread(summary['ratio_tokens_per_s'], 2)}**; "
        f"memory over TRL's: {spread(summary['ratio_peak_rss_mib'], 2)}.",
        "TRL has bfloat16 weights here, and the fastest of swept settings otherwise. The same ratios",
        "",
        *(
            f"- over {rival}: {spread(summary[prefix + 'tokens_per_s'], 2)}, "
            f"memory {spread(summary[prefix + 'peak_rss_mib'], 2)};"
            for rival, prefix in (
                ("TRL with those settings and our numerics (float32 weights, autocast)", "ratio_to_mixed_"),
                ("TRL with its defaults", "ratio_to_defaults_"),
            )
        ),
        "",
        f"{record['date'][:10]}, {machine['cpu']}, {work['threads']} threads, TRL {versions['trl']}, "
        f"transformers {versions['transformers']}, torch {versions['torch']}.",
    ]
    return "\n".join(lines)


def newest_benchmark() -> str:
    """The table of the latest comparison under `benchmarks/rl_step`, or a line that says there is none."""
    records = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "rl_step").glob("*.json")]
    compared = [record for record in records if "ratio_tokens_per_s" in record["summary"]]
    if not compared:
        return "No measurement is stored yet: `make bench`."
    return speed_table(max(compared, key=lambda record: record["date"]))


TABLES: dict[str, Callable[[], str]] = {"metrics": markdown_table, "rl_step": newest_benchmark}


def fill(text: str) -> str:
    """`text` with the part between each table's two markers replaced."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        body = table()
        text, count = re.subn(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md: {count} places for the table {name!r}, expected 1 pair of markers")
    return text


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    filled = fill(text)
    if "--check" in sys.argv[1:]:
        if filled != text:
            print("README.md is out of step; type: python scripts/readme_tables.py", file=sys.stderr)
        return int(filled != text)
    path.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
