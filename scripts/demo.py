"""The demo: GDPO on sums and differences from the shelf's primed model, judged on held-out problems before and after.

    python scripts/demo.py --seed 1        # or: make demo SEED=1

Writes runs/demo/summary.json, and the report's picture and page under runs/demo/rl/. Everything after `--` goes to
lit-reason-train, e.g. `python scripts/demo.py -- rollout.shuffle_rewards=true` for the control.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import rich
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("overrides", nargs="*", help="overrides for lit-reason-train")
    args = parser.parse_args()

    command = [sys.executable, "-m", "lit_reason.cli.train", "experiment=arith_gdpo", "resume=never"]
    command += [f"seed={args.seed}", f"run_dir={args.run_dir}", *args.overrides]
    # Idle OpenMP threads that spin make a busy machine many times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    began = time.perf_counter()
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        return code
    summary = json.loads((args.run_dir / "rl" / "summary.json").read_text())
    summary |= {"seed": args.seed, "seconds": time.perf_counter() - began}
    (args.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    rich.print(table(summary))
    print(f"summary  {args.run_dir / 'summary.json'}")
    print(f"picture  {args.run_dir / 'rl' / 'report.png'}")
    print(f"page     {args.run_dir / 'rl' / 'report.html'}")
    return 0


def table(summary: dict) -> Table:
    """Accuracy before and after, with intervals."""
    shown = Table(title=f"seed {summary['seed']}, {summary['n']} held-out problems, {summary['seconds']:.0f} s")
    for column in ("", "before", "after", "change in points"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, suffix in (("pass@1", ""), ("pass@1, format-blind", "_format_blind")):
        key = f"pass_at_1{suffix}"
        sides = [
            f"{100 * summary[f'{key}_{when}']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
            for when in ("before", "after")
            for low, high in [summary[f"ci{suffix}_{when}"]]
        ]
        low, high = summary[f"ci{suffix}_difference"]
        change = f"{100 * summary[f'difference{suffix}']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        shown.add_row(name, *sides, change)
    return shown


if __name__ == "__main__":
    sys.exit(main())
