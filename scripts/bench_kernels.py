"""Times the kernels of lit_kernels beside their rivals on this GPU, and says which targets they meet.

    python scripts/bench_kernels.py                     # everything: 161 cases, a few seconds each
    python scripts/bench_kernels.py --only dense moe    # some groups; the rest of the file stays
    python scripts/bench_kernels.py --check             # needs no GPU: every target as met, missed or unmeasured
    python scripts/bench_kernels.py --dry-run           # every case once, tiny and on the CPU, for its plumbing only

Writes `benchmarks/kernels/<gpu>.json` after each group, and from it the table by which lit_kernels chooses,
`kernels/lit_kernels/measured.json`. What fails or hangs is written down as that case's error. Needs torch and triton
only; kernels_measure.py says how a case is timed, kernels_targets.py what is to be reached.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels"))  # for a machine where nothing is installed

from bench import kernels_record, kernels_report  # noqa: E402
from bench.kernels_cases import GROUPS, cases  # noqa: E402
from bench.kernels_run import rows_of  # noqa: E402

TABLE = ROOT / "kernels" / "lit_kernels" / "measured.json"
DRY = "dry run"


def line(row: dict[str, Any]) -> str:
    """`dense fwd 4096x7168x16384: triton 0.712 (0.705 to 0.74), ...; repeats True, diff 0.00068 [4 s]`, times in ms."""
    name = f"{row['group']} {row['kind']} {'x'.join(map(str, row['shape']))}"
    if "error" in row:
        return f"{name}: {row['error']}"
    sides = ", ".join(f"{name} {of_side(side)}" for name, side in row["sides"].items())
    checks = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.get("checks", {}).items()
    )
    return f"{name}: {sides}; {checks} [{row['took_s']:.0f} s]"


def of_side(side: dict[str, Any]) -> str:
    return side["error"] if "error" in side else "{median:.4g} ({min:.4g} to {max:.4g})".format(**side["ms"])


def measured(group: str, args: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A group's rows, and under which circumstances they were measured; `keep` gets what there is after every row."""
    found = {**kernels_record.circumstances(args.commit), "seconds": args.seconds}
    start = end = kernels_record.clocks()
    rows, todo = [], len(cases(group, args.dry_run))
    for row in rows_of(cases, group, args.dry_run, args.seconds, args.limit):
        print(line(row), flush=True)
        rows.append(row)
        keep({**found, "clocks": {"start": start, "end": end}, "rows": rows})
        if len(rows) == todo:  # before the process ends and the clocks fall
            end = kernels_record.clocks()
    return {**found, "clocks": {"start": start, "end": end}, "rows": rows}


def run(args: argparse.Namespace) -> None:
    """Measures the groups, and writes after each case; a dry run only where `--out` says."""
    gpu = DRY if args.dry_run else torch.cuda.get_device_name()
    path = (args.out or kernels_record.FOLDER) / kernels_record.file_name(gpu)
    record = {"gpu": gpu, "groups": kernels_record.groups_so_far(path)}
    writes = args.out or not args.dry_run

    def keep(group: str, found: dict[str, Any]) -> None:
        record["groups"][group] = found
        if writes:
            kernels_record.write(path, record)

    for group in args.only:
        keep(group, measured(group, args, partial(keep, group)))
        if writes:
            kernels_record.write_dispatch_table(args.out / TABLE.name if args.out else TABLE, record)
            print(f"{group}: written to {path}", flush=True)


def missing() -> str:
    """Why nothing can be measured here; empty if it can."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch sees"
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP",
                        help=f"of {', '.join(GROUPS)}")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.0, help="for the repetitions of a case, all sides (1)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a case counts as hanging (90)")
    parser.add_argument("--out", type=Path, help="folder to write both files to, instead of into the checkout")
    parser.add_argument("--commit", default="", help="what to note as the commit, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; what it writes means nothing")
    parser.add_argument(
        "--check", action="store_true", help="print what the committed files say; 1 if a target is missed"
    )
    args = parser.parse_args(argv)
    if args.check:
        lines, good = kernels_report.check(kernels_record.records())
        print("\n".join(lines))
        return int(not good)
    if not args.dry_run and (reason := missing()):
        print(f"bench_kernels.py cannot measure: {reason}. Type --check or --dry-run", file=sys.stderr)
        return 2
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
