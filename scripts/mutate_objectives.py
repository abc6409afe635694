"""Do the tests bite? Change one sign, denominator or stop-gradient of the objectives at a time, and run their tests.

    python scripts/mutate_objectives.py                          # all files: about half an hour
    python scripts/mutate_objectives.py --class core --check
    python scripts/mutate_objectives.py --only clip.py rpg.py --show
    python scripts/mutate_objectives.py --sample 60 --seed 1

For every change that `mutation/operators.py` knows (its table says which are `core`), the tests of `tests/objectives`
run in a fork until one fails. A mutant that no test fails for has survived: mend the tests, or, where the changed code
does the same, say so in `mutation/equivalent.py`. Prints every survivor and a table. Without --sample the entries of
the files and classes that ran are renewed in `benchmarks/mutation/objectives.json`.

Exit status: 0; 1 with --check when less than 95% of a class are killed (those that do the same left out), when tests
fail without any change, or when `equivalent.py` names what no longer exists.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package beside this script, not one that is installed

from mutation.equivalent import EQUIVALENT  # noqa: E402
from mutation.fork import Order, Outcome, run_tests, warm  # noqa: E402
from mutation.operators import Mutant, mutants  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from scaling.record import circumstances, write_json  # noqa: E402

from lit_reason.errors import nearest  # noqa: E402

FOLDER = ROOT / "lit_reason" / "objectives"
PACKAGE = "lit_reason.objectives"
OUT = ROOT / "benchmarks" / "mutation" / "objectives.json"
SLOW = {"test_invariance.py"}  # real models and processes: what they catch, quicker tests must catch too
LEAST = 0.95
VERDICTS = ("killed", "survived", "equivalent")


@dataclass
class Tried:
    """A mutant and what became of it; `verdict` "equivalent": survived, and does the same."""

    mutant: Mutant
    outcome: Outcome

    @property
    def verdict(self) -> str:
        if self.outcome.killer is not None:
            return "killed"
        return "equivalent" if self.mutant.key in EQUIVALENT else "survived"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    files = sorted(FOLDER.glob("*.py"))
    names = [path.name for path in files]
    for name in args.only or ():
        if name not in names:
            print(f"--only: got {name!r}; {nearest(name, names)}", file=sys.stderr)
            return 2
    every = [mutant for path in files for mutant in mutants(path)]
    gone = sorted(set(EQUIVALENT) - {mutant.key for mutant in every})
    if gone:
        print("mutation/equivalent.py names what no longer exists:", *gone, sep="\n  ")
    chosen = [m for m in every if (not args.only or m.path.name in args.only) and args.kind in (None, m.kind)]
    if args.again:
        chosen = _survived_before(chosen)
    if args.sample is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.show:
        for mutant in chosen:
            print(_told(mutant))
        return 0

    warm(PACKAGE)
    tests = sorted(str(path) for path in (ROOT / "tests" / "objectives").glob("test_*.py") if path.name not in SLOW)
    bare = run_tests(None, PACKAGE, tests, Order(Counter(), {}), args.limit)
    if bare.killer is not None:
        print(f"fails without any change: {bare.killer}")
        return 1
    print(f"{len(chosen)} mutants; all tests take {bare.seconds:.1f} s")
    tried: list[Tried] = []
    for name in dict.fromkeys(mutant.path.name for mutant in chosen):
        here = [mutant for mutant in chosen if mutant.path.name == name]
        print(f"{name}: {len(here)}", flush=True)
        found = _try(here, tests, bare.durations, args)
        tried += found
        if args.sample is None:
            _write(found, names, args.again)
    low = _report(tried)
    return int(args.check and (low or bool(gone)))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FILE", help="these files only, e.g. clip.py")
    parser.add_argument("--class", dest="kind", choices=("core", "other"), help="this class of changes only")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=120, metavar="S", help="seconds until a mutant counts as killed")
    parser.add_argument("--again", action="store_true", help="only what survived when it was last written (tests grew)")
    parser.add_argument("--trust", action="store_true", help="take equivalent.py's word: do not run what it names")
    parser.add_argument("--show", action="store_true", help="list the mutants and stop")
    parser.add_argument("--check", action="store_true", help="exit 1 when less than 95%% are killed")
    return parser.parse_args(argv)


def _try(mutants: list[Mutant], tests: list[str], durations: dict[str, float], args: argparse.Namespace) -> list[Tried]:
    """Mutants of one file. The tests that killed most come first, so that most fall to their first test."""
    tried, kills = [], Counter[str]()
    for mutant in mutants:
        if args.trust and mutant.key in EQUIVALENT:
            tried.append(Tried(mutant, Outcome(None, 0.0)))
            continue
        module = f"{PACKAGE}.{mutant.path.stem}"
        one = Tried(mutant, run_tests(mutant, module, tests, Order(kills, durations), args.limit))
        tried.append(one)
        if one.outcome.killer:
            kills[one.outcome.killer] += 1
        if one.verdict == "survived":
            print(f"SURVIVED {_told(mutant)}", flush=True)
    return tried


def _told(mutant: Mutant) -> str:
    before, _, after = mutant.change.partition(" -> ")
    where = f"{mutant.path.name}:{mutant.line} {mutant.function}"
    return f"{where} [{mutant.kind}, {mutant.operator}]\n  - {before}\n  + {after}"


def _counts(tried: list[Tried]) -> dict[str, dict[str, dict[str, int]]]:
    """`{file: {class: {verdict: number}}}`, with a file "all"."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for one in tried:
        for name in (one.mutant.path.name, "all"):
            counts.setdefault(name, {}).setdefault(one.mutant.kind, Counter())[one.verdict] += 1
    last = counts.pop("all", {})
    return {name: {kind: dict(n) for kind, n in kinds.items()} for name, kinds in (counts | {"all": last}).items()}


def _share(verdicts: dict[str, int]) -> float:
    judged = verdicts.get("killed", 0) + verdicts.get("survived", 0)
    return verdicts.get("killed", 0) / judged if judged else 1.0


def _report(tried: list[Tried]) -> bool:
    """Prints the table; whether a class is below the limit."""
    table = Table("file", "class", "mutants", "killed", "survived", "do the same", "killed of the rest")
    counts = _counts(tried)
    for name, kinds in counts.items():
        for kind, verdicts in sorted(kinds.items()):
            numbers = [verdicts.get(verdict, 0) for verdict in VERDICTS]
            table.add_row(name, kind, *map(str, (sum(numbers), *numbers)), f"{_share(verdicts):.1%}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return any(_share(verdicts) < LEAST for verdicts in counts["all"].values())


def _written() -> dict[str, Any]:
    return json.loads(OUT.read_text())["files"] if OUT.exists() else {}


def _digest(name: str) -> str:
    return hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()[:16]


def _survived_before(mutants: list[Mutant]) -> list[Mutant]:
    """Those that `OUT` has as survivors of the very same source."""
    entries = [entry for kinds in _written().values() for entry in kinds.values()]
    known = {(entry["source"], s["where"], s["change"]) for entry in entries for s in entry["survivors"]}
    return [m for m in mutants if (_digest(m.path.name), f"{m.path.name}:{m.line}", m.change) in known]


def _write(tried: list[Tried], names: list[str], again: bool) -> None:
    """Renews the entries of what was tried; forgets files that are gone. `again`: what was killed before stays so."""
    files = {name: entry for name, entry in _written().items() if name in names}
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    for name, kinds in _counts(tried).items():
        for kind, verdicts in kinds.items() if name != "all" else ():
            here = [one for one in tried if (one.mutant.path.name, one.mutant.kind) == (name, kind)]
            entry = files.setdefault(name, {})
            before = entry.get(kind, {}).get("killed", 0) if again else 0
            entry[kind] = {
                "commit": git.stdout.strip(),
                "source": _digest(name),
                "date": time.strftime("%Y-%m-%d %H:%M"),
                "seconds": sum(one.outcome.seconds for one in here),
                **{verdict: verdicts.get(verdict, 0) for verdict in VERDICTS},
                "killed": before + verdicts.get("killed", 0),
                "survivors": [_survivor(one) for one in here if one.outcome.killer is None],
            }
    totals = {
        kind: {verdict: sum(kinds[kind][verdict] for kinds in files.values() if kind in kinds) for verdict in VERDICTS}
        for kind in ("core", "other")
    }
    for verdicts in totals.values():
        verdicts["killed_share"] = _share(verdicts)  # type: ignore[assignment]
    write_json(OUT, circumstances("cpu") | {"totals": totals, "files": dict(sorted(files.items()))})


def _survivor(one: Tried) -> dict[str, Any]:
    mutant = one.mutant
    return {
        "where": f"{mutant.path.name}:{mutant.line}",
        "function": mutant.function,
        "operator": mutant.operator,
        "change": mutant.change,
        "explanation": EQUIVALENT.get(mutant.key),
    }


if __name__ == "__main__":
    raise SystemExit(main())
