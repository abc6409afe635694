"""Rounds generated beside training (`rollout.shape.staleness=1`) against one after the other, on two cores.

    python scripts/bench_async.py                                      # 3 seeds of the demo's task
    python scripts/bench_async.py --seeds 1 --rounds 12 --evaluate 0   # times alone
    python scripts/bench_async.py --report                             # of finished runs

Training is pinned to the first core and the engine, a process of its own, to the second; in the synchronous arm
likewise. Both arms correct for the gap between engine and trainer. A step is the time between the completions files of
two rounds. With `--engine thread` the engine stays in the trainer's process, on both cores: they then share its Python.
The record goes to benchmarks/async.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.record import circumstances, run, write_json
from studies.runs import ROOT, Training, read_json, run_missing
from studies.stats import paired_interval, t_interval

from lit_reason.report.records import read_metrics

FOLDER, RECORDS = Path("runs/bench_async"), ROOT / "benchmarks" / "async"
COMMON = (
    "experiment=arith_gdpo",
    "extras.threads=1",
    "+algorithm.correction={name: truncate, level: token, high: 2.0}",
)
ARMS = {"synchronous": 0, "staleness 1": 1, "staleness 2": 2}
ENGINES = {
    "process": ("rollout=builtin_process", "rollout.engine.cores=[1]"),
    "thread": (),
}
WARM_UP = 3  # rounds at the start that no time is taken of


@dataclass(frozen=True)
class Pinned(Training):
    """A training on some cores; an engine of its own process may take others."""

    cores: str = "0"

    def command(self, folder: Path) -> list[str]:
        return ["taskset", "-c", self.cores, *super().command(folder)]


def training(arm: str, seed: int, args: argparse.Namespace) -> Pinned:
    overrides = (
        *COMMON,
        *ENGINES[args.engine],
        f"evaluation.n={args.evaluate}",
        f"rollout.shape.rounds={args.rounds}",
        f"rollout.shape.staleness={ARMS[arm]}",
        f"seed={seed}",
        *args.overrides,
    )
    words = [args.engine, arm, f"rounds{args.rounds}", f"seed{seed}", *args.overrides]
    name = re.sub(r"[^\w.-]+", "_", "-".join(words))
    return Pinned(name, overrides, cores="0" if args.engine == "process" else "0,1")


def measure(arm: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """Medians over the rounds of one run, in seconds, and what it learnt."""
    written = [path.stat().st_mtime for path in sorted((run_dir / "completions").glob("step-*.jsonl"))]
    steps = [later - sooner for sooner, later in itertools.pairwise(written)]
    rows, summary = read_metrics(run_dir), run_dir / "summary.json"
    tokens = [row["completion/length"] * completions(run_dir) for row in rows]

    def median(values: Sequence[float]) -> float:
        return statistics.median(values[WARM_UP:])

    return {
        "arm": arm,
        "seed": seed,
        "step_s": median(steps),
        "generate_s": median([n / row["speed/generate_tokens_per_s"] for n, row in zip(tokens, rows, strict=True)]),
        # a row's rate is that of the round before
        "train_s": median([n / row["speed/train_tokens_per_s"] for n, row in zip(tokens[:-1], rows[1:], strict=True)]),
        "wait_s": median([row["speed/wait_s"] for row in rows]),
        "sync_s": median([row["speed/sync_s"] for row in rows]),
        "age": median([row["rollout/age/mean"] for row in rows]),
        "mismatch_kl": median([row["mismatch/kl"] for row in rows]),
        "held_out": read_json(summary)["pass_at_1_after"] if summary.exists() else None,
    }


def completions(run_dir: Path) -> int:
    return len(min((run_dir / "completions").glob("step-*.jsonl")).read_text().splitlines())


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per arm the intervals over seeds; against the synchronous arm the paired ones: how many times shorter a step is,
    and the difference in held-out accuracy."""
    by_arm = {arm: {r["seed"]: r for r in runs if r["arm"] == arm} for arm in dict.fromkeys(r["arm"] for r in runs)}
    first, *others = by_arm
    keys = [key for key, value in runs[0].items() if isinstance(value, float)]
    found: dict[str, Any] = {
        arm: {key: t_interval([r[key] for r in of_seed.values()]) for key in keys} for arm, of_seed in by_arm.items()
    }
    base = by_arm[first]
    for arm in others:
        of_seed = by_arm[arm]
        found[arm]["times_shorter"] = t_interval([base[s]["step_s"] / r["step_s"] for s, r in of_seed.items()])
        if "held_out" in keys:
            found[arm]["held_out_minus"] = paired_interval(
                {s: r["held_out"] for s, r in of_seed.items()}, {s: r["held_out"] for s, r in base.items()}
            )
    return found


def show(summary: Mapping[str, Any]) -> None:
    for arm, values in summary.items():
        print(f"\n{arm}")
        for key, interval in values.items():
            print(f"  {key:16} {interval.text('.4g')}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS)[:2], help="the first is compared with"
    )
    parser.add_argument("--rounds", type=int, default=60, help="of each run (60)")
    parser.add_argument("--evaluate", type=int, default=1000, help="held-out problems; 0: only times (1000)")
    parser.add_argument("--engine", choices=list(ENGINES), default="process", help="where it generates (process)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--name", default=time.strftime("%Y%m%d"), help="of the record (the date)")
    parser.add_argument("overrides", nargs="*", help="further ones for every run, after --")
    args = parser.parse_args(argv)
    if args.rounds < WARM_UP + 2:
        parser.error(f"--rounds {args.rounds}: at least {WARM_UP + 2}, the first {WARM_UP} are not timed")
    # arm by arm within a seed, so that the machine's moods meet both
    trainings = {(arm, seed): training(arm, seed, args) for seed in args.seeds for arm in args.arms}
    if not args.report:
        run_missing(list(trainings.values()), FOLDER)
    runs = [measure(*pair, ROOT / FOLDER / found.name / found.last) for pair, found in trainings.items()]
    summary = summarise(runs)
    settings = {"common": COMMON, "engine": args.engine, "rounds": args.rounds, "overrides": args.overrides}
    path = RECORDS / f"{args.name}.json"
    write_json(path, {**circumstances("cpu"), "settings": settings, "summary": summary, "runs": runs})
    show(summary)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    run(main)
