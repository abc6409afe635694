"""Write the generated tables of README.md and docs/: what is logged, and what the files under `benchmarks/` measured.

python scripts/readme_tables.py            # rewrite them
python scripts/readme_tables.py --check    # exit 1 when one is out of step
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import experts_report, kernels_record, kernels_report
from studies import fp8, gdpo, learning

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


def coordinate_check() -> str:
    """The steepest slopes of every coordinate check under `benchmarks/mup`."""
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "mup").glob("coord_*.json"))]
    hidden, update, uk, control = (records[0]["limits"][key] for key in ("hidden", "update", "update_W_UK", "control"))
    lines = [
        f"| ladder | branch_gain | hidden ({hidden:.2f}) | update ({update:.2f}) | W_UK ({uk:.2f}) | "
        f"control (at least {control:+.2f}) | beyond |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        settings, slopes = record["settings"], record["slopes"]
        sizes, gain = settings["sizes"], settings.get("branch_gain", 1.0)
        hidden, control = (
            [s for s in slopes if (s["scheme"], s["measure"]) == (scheme, "change") and s["name"] not in LOGITS]
            for scheme in ("mup", "sp")
        )
        updates = [s for s in slopes if (s["scheme"], s["measure"]) == ("mup", "update")]
        cells = [
            f"{settings['axis']} {sizes[0]}-{sizes[-1]}, {settings['optimizer']}, lr {settings['lr']:g}, "
            f"step {settings['steps']}, {settings['seeds']} seeds",
            f"{gain:g}",
            steepest(hidden),
            steepest([s for s in updates if s["name"] != "W_UK"]),
            steepest([s for s in updates if s["name"] == "W_UK"]),
            named(max(control, key=lambda s: s["value"])) if control else "not run",
            beyond(record),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


LOGITS = ("router_logits", "head_logits")  # judged by their updates


def steepest(slopes: list[dict[str, Any]]) -> str:
    return named(max(slopes, key=lambda s: abs(s["value"])))


def named(slope: dict[str, Any]) -> str:
    """`expert_down -0.12`."""
    return f"{slope['name']} {slope['value']:+.2f}"


def beyond(record: dict[str, Any]) -> str:
    """The quantities that miss their limits."""
    found = [s["name"] for s in record["slopes"] if s["limit"] is not None and not abs(s["value"]) <= s["limit"]]
    found += ["the control" for line in record["violations"] if line.startswith("the control")]
    return ", ".join(found) or "none"


def lr_transfer() -> str:
    """Optimum, shift and loss by width, of every sweep under `benchmarks/mup`."""
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "mup").glob("lr_transfer*.json"))]
    shared = ("steps", "batch", "seq_len", "seeds", "precision", "base_width")
    if len({tuple(record["settings"][key] for key in shared) for record in records}) > 1:
        raise SystemExit(f"benchmarks/mup/lr_transfer*.json differ in one of {', '.join(shared)}")
    settings, record = records[0]["settings"], records[0]
    lines = [
        "| | width | log2 of the best rate | shift (octaves) | loss there | more at the base's best |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for name, found in (item for record in records for item in record["summary"].items()):
        for width, row in found["widths"].items():
            rate, shift = (f"{row[key]:+.2f} ± {number(row[f'{key}_se'], '.2f')}" for key in ("log2_lr", "shift"))
            rate += "" if row["resolved"] else " (edge of the grid)"
            cells = [name, width, rate, shift, number(row["loss"], ".4f"), number(row["gap"], "+.4f")]
            lines.append(f"| {' | '.join(cells)} |")
        notes.append(f"{name}: {({True: 'yes', False: 'no', None: 'no rate in common'})[found['wider']]}")
    tokens = settings["steps"] * settings["batch"] * settings["seq_len"]
    return "\n".join([
        *lines, "",
        f"{settings['steps']} steps, {tokens:,} tokens, {settings['seeds']} seeds (means ± standard errors), "
        f"{settings['precision']}, {record['machine']['device']}, torch {record['versions']['torch']}, "
        f"{record['date'][:10]}. Wider is better at every rate up to the optimum: {'; '.join(notes)}.",
    ])  # fmt: skip


def number(value: float | None, form: str) -> str:
    """What a file holds as null was not finite."""
    return "diverged" if value is None else f"{value:{form}}"


def in_use() -> str:
    """One recipe at several widths."""
    record = json.loads((ROOT / "benchmarks" / "mup" / "in_use.json").read_text())
    lines = ["| width | parameters | lr | pretraining loss | primed pass@1 |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        low, high = row["interval"]
        primed = f"{row['pass_at_1']:.1%} [{low:.1%}, {high:.1%}]"
        lines.append(f"| {row['width']} | {row['parameters']:,} | {row['lr']:g} | {row['loss']:.4f} | {primed} |")
    row = record["rows"][0]
    tokens = row["steps"] * row["rows"] * row["seq_len"]
    work = f"{row['steps']} steps, {tokens:,} tokens, seed {row['seed']}; {row['problems']} held-out problems"
    return "\n".join([*lines, "", f"{work}; {record['date']}."])


def balance() -> str:
    """Ways of balancing experts."""
    record = json.loads((ROOT / "benchmarks" / "balance" / "balance.json").read_text())
    lines = [
        "| | max violation, last batches | on validation text | below 0.5 from step | dead | val loss | minus bias |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in record["summary"].items():
        errors = [("max_violation", ".2f"), ("max_violation_val", ".2f"), ("val", ".4f"), ("val_minus_bias", "+.4f")]
        values = [f"{row[key][0]:{form}} ± {number(row[key][1], form.strip('+'))}" for key, form in errors]
        steps = ", ".join("never" if step is None else str(step) for step in row["steps_to_limit"])
        lines.append(f"| {name} | {values[0]} | {values[1]} | {steps} | {row['dead']} | {values[2]} | {values[3]} |")
    settings = record["settings"]
    tokens = settings["steps"] * settings["batch"] * settings["seq_len"]
    return "\n".join([
        *lines, "",
        f"{settings['experts']} experts, {settings['experts_per_token']} chosen, width {settings['width']}; bias steps "
        f"of {settings['bias_rate']:g}; {settings['steps']} steps, {tokens:,} tokens, {settings['seeds']} seeds (means "
        f"± standard errors), {record['machine']['device']}, {record['date'][:10]}.",
    ])  # fmt: skip


def drafts() -> str:
    """Greedy decoding with and without multi-token prediction."""
    record = json.loads((ROOT / "benchmarks" / "speculative" / "speculative.json").read_text())
    lines = [
        "| rows at a time | tokens/s over plain decoding | drafts accepted | same completions |",
        "|---|---|---|---|",
    ]
    for row in record["rows"]:
        spread = f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        lines.append(f"| {row['batch']} | {spread} | {row['accepted']:.0%} | {row['same']}/{row['prompts']} |")
    return "\n".join(lines)


def kernels() -> str:
    """What the kernels are to reach, and what was measured."""
    return kernels_report.markdown(kernels_record.records())


def gdpo_table(table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table of the study of GDPO."""
    return lambda: table(json.loads((ROOT / "benchmarks" / "studies" / "gdpo.json").read_text()))


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"metrics": markdown_table, "rl_step": newest_benchmark},
    "docs/mup.md": {"lr_transfer": lr_transfer, "coord": coordinate_check, "in_use": in_use, "balance": balance},
    "benchmarks/README.md": {"drafts": drafts, "kernels": kernels},
    "docs/kernels.md": {
        "layer": experts_report.layer_table,
        "step": experts_report.step_table,
        "project": experts_report.project_table,
    },
    "docs/studies/gdpo.md": {name: gdpo_table(table) for name, table in gdpo.TABLES.items()},
    **{f"docs/studies/{name}.md": learning.tables(name) for name in learning.STUDIES},
}
PAGES["docs/studies/fp8.md"]["pretraining"] = fp8.pretraining_table


def fill(page: str, text: str) -> str:
    """`text` of a page with the part between each of its tables' two markers replaced."""
    for name, table in PAGES[page].items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        body = table()
        text, count = re.subn(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page}: {count} places for the table {name!r}, expected 1 pair of markers")
    return text


def main() -> int:
    stale = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        filled = fill(page, text)
        if filled != text:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                (ROOT / page).write_text(filled)
    if stale and "--check" in sys.argv[1:]:
        print(f"{', '.join(stale)} out of step; type: python scripts/readme_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
