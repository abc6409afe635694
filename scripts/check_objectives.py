"""Compare the shipped objectives with files of reference numbers (float64).

    python scripts/check_objectives.py tests/golden --subset
    python scripts/check_objectives.py DIR --objective gdpo_paper

DIR holds `batch_main.json` (the batch), `objectives_main.json` (advantages, loss and gradient per name) and any of
`gdpo_collapse.json`, `edge_cases.json`, `kl_entropy_gkd.json`, `ppo_critic.json`, `zero_one_view.json`. Every name is
built from a `conf/algorithm/*.yaml` plus overrides (`golden/cases.py`), and goes through `Objective.advantages` and
`Objective.loss`, the functions that training calls; the other files are checked part by part (`golden/files.py`).

Exit status: 0 all agree; 1 an error above 1e-12, a name or file that is not covered (unless --subset), or nothing
checked; 2 a folder or name that does not exist.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from golden.cases import CASES, Errors, build, check_case, complete, stated
from golden.files import FILES, check_collapse
from rich.console import Console
from rich.table import Table

from lit_reason.errors import nearest

__all__ = ["CASES", "FILES", "build", "check_case", "check_collapse", "complete", "main", "stated"]

TOLERANCE = 1e-12
KNOWN_FILES = {"batch_main.json", "objectives_main.json", *FILES}


def main(argv: list[str] | None = None) -> int:
    """Check a folder, print a table; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with batch_main.json, objectives_main.json and others")
    parser.add_argument("--subset", action="store_true", help="list what is not covered instead of failing for it")
    parser.add_argument("--objective", help="check this name only, e.g. gdpo_paper")
    args = parser.parse_args(argv)

    files = {path.name: json.loads(path.read_text()) for path in sorted(args.folder.glob("*.json"))}
    if not files:
        print(f"no .json files in {str(args.folder)!r}; valid: a folder such as tests/golden", file=sys.stderr)
        return 2
    golden = files.get("objectives_main.json", {"objectives": {}})
    others = {name.removesuffix(".json"): name for name in FILES if name in files}
    names = [*golden["objectives"], *others]
    missing = [name for name in golden["objectives"] if name not in CASES]
    missing += [name for name in files if name not in KNOWN_FILES]
    batch_file = golden.get("inputs_file", "batch_main.json")
    if names and batch_file not in files:
        print(f"{args.folder} has numbers to compare but not {batch_file}, the batch they refer to", file=sys.stderr)
        return 2
    if args.objective:
        if args.objective not in names:
            print(f"--objective: got {args.objective!r}; {nearest(args.objective, names)}", file=sys.stderr)
            return 2
        names = [args.objective]
        missing = [name for name in missing if name in names]

    results: dict[str, Errors] = {}
    for name in names:
        inputs = files[batch_file]["inputs"]
        if name in others:
            results |= FILES[others[name]](files[others[name]], inputs)
        elif name in CASES:
            results[name] = check_case(name, complete(name, golden["objectives"]), inputs)
    return report(results, missing, args.subset)


def report(results: Mapping[str, Errors], missing: list[str], subset: bool) -> int:
    """Print the table and the verdict; the exit status."""
    table = Table("objective", *Errors._fields, "verdict", title="worst error")
    for name, errors in results.items():
        cells = ["-" if e is None else f"{e:.1e}" for e in errors]
        table.add_row(name, *cells, "ok" if errors.worst <= TOLERANCE else "WRONG")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    wrong = [name for name, errors in results.items() if errors.worst > TOLERANCE]
    print(f"{len(results) - len(wrong)} of {len(results)} agree within {TOLERANCE}")
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    if missing:
        print(f"{'left out' if subset else 'NOT COVERED (type --subset to leave them out)'}: {', '.join(missing)}")
    return int(bool(wrong) or not results or (bool(missing) and not subset))


if __name__ == "__main__":
    raise SystemExit(main())
