"""Tables of what experts cost on a CPU: the layer, a training step, a project of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def layer_table() -> str:
    """Every record of `bench_experts.py`: a row per size, a column per form."""
    rows = []
    for record in records("experts"):
        settings = record["settings"]
        loads = "kept" if settings["same"] else "new in every repeat"
        for size, forms in record["found"].items():
            names, loop = list(forms)[1:], forms["loop"]
            cells = [f"{size}, {loads}", f"{1e3 * loop['both_s']['median']:.0f} ms"]
            cells += [
                f"{1e3 * forms[name]['both_s']['median']:.0f} ms, {ratio(forms[name]['times_the_loop'])}"
                for name in names
            ]
            rows.append((["D x F, loads", "loop", *names], cells))
    settings = records("experts")[-1]["settings"]
    work = f"{settings['tokens']} tokens, {settings['experts']} experts, {settings['chosen']} chosen"
    return markdown([rows[0][0], *(cells for _, cells in rows)], f"{work}, {settings['dtype']}, ", records("experts"))


def step_table() -> str:
    """The newest record of `bench_rl_step.py --only experts`."""
    record = [found for found in records("rl_step") if "lit_loop" in found["summary"]][-1]
    names = {"lit_loop": "a loop over the experts", "lit_grouped": "GroupedGEMM", "lit_reason": "as it comes"}
    rows = [["experts", "step", "of it training", "peak memory"]]
    for name, label in names.items():
        one = record["summary"][name]
        cells = [f"{one[key]['median']:.2f} s" for key in ("step_s", "train_s")]
        rows.append([label, *cells, f"{one['peak_rss_mib']['median']:.0f} MiB"])
    return markdown(rows, "medians of 3 processes, ", [record])


def project_table() -> str:
    """The newest record of `bench_swaps.py`."""
    record = records("swaps")[-1]
    summary, ours = record["summary"], "with callbacks"
    rows = [["", "step", "memory", "times faster with callbacks", "largest relative difference of a loss"]]
    for side in [name for name in record["runs"] if name != ours] + [ours]:
        one, against = summary[side], summary.get(f"against {side}")
        cells = [f"{one['step_s']['median']:.2f} s", f"{one['memory_mib']['median']:.0f} MiB"]
        cells += [ratio(against["speed"]), f"{against['largest_loss_difference']:.1e}"] if against else ["", ""]
        rows.append([side, *cells])
    settings = record["settings"]
    return markdown(rows, f"{settings['precision']}, medians of {settings['repeats']} processes, ", [record])


def records(folder: str) -> list[dict[str, Any]]:
    """Of a folder under benchmarks/, oldest first."""
    found = [json.loads(path.read_text()) for path in (BENCHMARKS / folder).glob("*.json")]
    return sorted(found, key=lambda record: record["date"])


def ratio(spread: dict[str, float]) -> str:
    """`3.1x (2.9 to 3.4)`: median, least and greatest."""
    return f"{spread['median']:.1f}x ({spread['min']:.1f} to {spread['max']:.1f})"


def markdown(rows: list[list[str]], work: str, of: list[dict[str, Any]]) -> str:
    head, *body = rows
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    machine = of[-1]["machine"]
    return "\n".join([*lines, "", f"{work}{machine['cpu']}, {machine['cores']} cores, {of[-1]['date'][:10]}."])
