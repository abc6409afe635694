"""Tables of what experts cost on a CPU: the layer, a training step, a project of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def layer_table() -> str:
    """The newest record of `bench_experts.py` for products that are new and for those that are compiled already."""
    newest = {record["settings"]["known"]: record for record in records("experts")}
    rows = [["D x F, products", "", "forward and backward", "over the loop", "over the loop, unbound"]]
    for known, record in newest.items():
        for size, forms in record["found"].items():
            for name, form in forms.items():
                first = f"{size}, {'compiled before' if known else 'as loads come'}" if name == "loop" else ""
                ratios = [ratio(form[f"times_the_{loop}"]) for loop in ("loop", "loop, unbound")]
                rows.append([first, name, f"{1e3 * form['both_s']['median']:.0f} ms", *ratios])
    settings = record["settings"]
    work = f"{settings['tokens']} tokens, {settings['experts']} experts, {settings['chosen']} chosen"
    load = f"the largest load {record['largest_over_mean_load']['median']:.1f} times the mean"
    return markdown(rows, f"{work}, {load}, {settings['dtype']}, torch {record['versions']['torch']}, ", record)


def step_table() -> str:
    """The newest record of `bench_rl_step.py --only experts`."""
    record = [found for found in records("rl_step") if "lit_loop" in found["summary"]][-1]
    names = {"lit_loop": "a loop over the experts", "lit_grouped": "GroupedGEMM", "lit_reason": "as it comes"}
    rows = [["experts", "step", "of it training", "peak memory"]]
    for name, label in names.items():
        one = record["summary"][name]
        cells = [f"{one[key]['median']:.2f} s" for key in ("step_s", "train_s")]
        rows.append([label, *cells, f"{one['peak_rss_mib']['median']:.0f} MiB"])
    return markdown(rows, f"medians of {len(record['runs']['lit_loop'])} processes, ", record)


def project_table() -> str:
    """The newest record of `bench_swaps.py`."""
    record = records("swaps")[-1]
    summary, versions = record["summary"], record["versions"]
    rows = [["", "step", "memory", "times faster with both", "largest relative difference of a loss to both"]]
    for side in record["runs"]:
        one, against = summary[side], summary.get(f"against {side}")
        cells = [f"{one['step_s']['median']:.2f} s", f"{one['memory_mib']['median']:.0f} MiB"]
        cells += [ratio(against["speed"]), f"{against['largest_loss_difference']:.1e}"] if against else ["", ""]
        rows.append([side, *cells])
    work = f"{record['settings']['precision']}, medians of {record['settings']['repeats']} processes"
    return markdown(rows, f"{work}, torch {versions['torch']}, transformers {versions['transformers']}, ", record)


def records(folder: str) -> list[dict[str, Any]]:
    """Of a folder under benchmarks/, oldest first."""
    found = [json.loads(path.read_text()) for path in (BENCHMARKS / folder).glob("*.json")]
    return sorted(found, key=lambda record: record["date"])


def ratio(spread: dict[str, float]) -> str:
    """`3.1x (2.9 to 3.4)`: median, least and greatest."""
    return f"{spread['median']:.1f}x ({spread['min']:.1f} to {spread['max']:.1f})"


def markdown(rows: list[list[str]], work: str, record: dict[str, Any]) -> str:
    head, *body = rows
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    machine = record["machine"]
    return "\n".join([*lines, "", f"{work}{machine['cpu']}, {machine['cores']} cores, {record['date'][:10]}."])
