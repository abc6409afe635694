"""GDPO against GRPO, measured: docs/studies/gdpo.md.

    python scripts/study_gdpo.py            # run what is missing, then write the results
    python scripts/study_gdpo.py --report   # write the results of finished runs

A start that is only half primed, then one run per arm and seed; the arms differ in `algorithm.advantage` alone, and at
equal seeds they meet the same prompts in the same order. A run takes about 3 minutes of a core that does nothing else;
interrupted, the same command goes on. Written are

    benchmarks/studies/gdpo.json   every run's curves and figures, and intervals over seeds
    docs/studies/gdpo.svg          the curves
    docs/studies/gdpo.md           the tables between its markers
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from readme_tables import fill
from scaling.record import circumstances, new_figure, run, write_json
from studies import gdpo, plot
from studies.runs import ROOT, Training, curve, held_out, rounds, run_missing, trained_by

FOLDER = Path("runs/studies/gdpo")
RECORD = ROOT / "benchmarks" / "studies" / "gdpo.json"
PAGE = "docs/studies/gdpo.md"
WINDOW = 5  # rounds over which the plotted curves are averaged

START = Training(
    "start",
    (
        "stages=[pretrain,sft]",
        "init=arith-1m.sft",
        "seed=100",
        "extras.threads=1",
        "text.batch_size=16",
        "pretrain.trainer.max_steps=60",
        "pretrain.optimizer.lr=0.001",
        "priming.n_examples=500",
        "sft.trainer.max_steps=12",
        "sft.optimizer.lr=0.0005",
        "evaluation.n=0",
    ),
    last="sft",
)
LENGTH_LIMIT = 26
REWARD = (
    "reward.format.weight=1",
    "reward.length.weight=1",
    f"reward.length.max_tokens={LENGTH_LIMIT}",
    "reward.length.buffer=0",
)
COMMON = (
    "experiment=arith_gdpo",
    f"init=dir:{FOLDER}/start/sft/model",
    "extras.threads=1",
    *REWARD,
    "evaluation.n=500",
)
HELD_OUT = ("n=2000", "extras.threads=1", "rollout.sampling.max_tokens=48", *REWARD)  # all held-out problems there are


def training(arm: str, seed: int, n_rounds: int) -> Training:
    # null first: a mapping on the command line would be merged into the one it replaces
    advantage = ("algorithm.advantage=null", f"algorithm.advantage={gdpo.ARMS[arm]}")
    overrides = (*COMMON, f"rollout.shape.rounds={n_rounds}", f"seed={seed}", *advantage)
    return Training(f"{arm.lower().replace(' ', '_')}-{seed}", overrides)


def measure(arm: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """What is kept of one run."""
    played = list(rounds(run_dir))
    curves = {name: curve(run_dir, f"reward/{name}/mean") for name in gdpo.REWARDS}
    curves["all three"] = [gdpo.all_three(rows) for rows in played]
    return {
        "arm": arm,
        "seed": seed,
        "held_out": gdpo.means(held_out(run_dir, HELD_OUT)),
        "curves": curves,
        "resolution": {seen: over_rounds(gdpo.resolution, seen, played) for seen in gdpo.ARMS},
        "credit": {seen: over_rounds(gdpo.credit, seen, played) for seen in gdpo.ARMS},
    }


def over_rounds(figures: Callable[..., Sequence[float]], seen: str, played: Sequence[Any]) -> list[float]:
    """Means over rounds of what the advantages of the arm `seen` are on these completions."""
    return [statistics.fmean(column) for column in zip(*(figures(seen, rows) for rows in played), strict=True)]


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Above each arm's curves, below GDPO's minus the others' at the same seed."""
    arms = gdpo.arms_of(runs)
    curves = {arm: {r["seed"]: r["curves"] for r in runs if r["arm"] == arm} for arm in arms}
    figure = new_figure(11, 5, "Rewards of the completions of each round")
    axes = figure.subplots(2, len(gdpo.CURVES))
    for (above, below), name in zip(axes.T, gdpo.CURVES, strict=True):
        levels = {arm: {seed: found[name] for seed, found in curves[arm].items()} for arm in arms}
        plot.band(above, levels, WINDOW)
        plot.tidy(above, name)
        plot.difference_band(below, levels.pop("GDPO"), levels, WINDOW)
        plot.tidy(below, f"{name}: GDPO minus", f"round (running means over {WINDOW})")
    for ax in axes[:, 0]:
        ax.legend(fontsize=8, frameon=False)
    plot.save_svg(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--arms", choices=list(gdpo.ARMS), nargs="+", default=["GDPO", "GRPO"], help="(GDPO GRPO)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(1 2 3 4 5)")
    parser.add_argument("--rounds", type=int, default=50, help="of each run (50)")
    args = parser.parse_args(argv)
    # seed by seed, so that an interrupted study has whole pairs
    pairs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    trainings = {pair: training(*pair, args.rounds) for pair in pairs}
    if not args.report:
        run_missing([START, *trainings.values()], FOLDER)
    folders = {pair: ROOT / FOLDER / found.name / found.last for pair, found in trainings.items()}
    runs = [measure(*pair, folder) for pair, folder in folders.items()]
    items = {pair: held_out(folder, HELD_OUT) for pair, folder in folders.items()}
    record = {
        **circumstances("cpu"),
        "commits": sorted({trained_by(folder) for folder in folders.values()}),
        "settings": {
            "seeds": args.seeds,
            "rounds": args.rounds,
            "start": START.overrides,
            "common": COMMON,
            "held_out": HELD_OUT,
            "arms": {arm: gdpo.ARMS[arm] for arm in args.arms},
        },
        "distinct_groups": gdpo.counts(),
        "start": gdpo.means(held_out(ROOT / FOLDER / START.name / START.last, HELD_OUT)),
        "summary": gdpo.summary(runs) | {"held-out, over problems": gdpo.over_problems(items)},
        "runs": runs,
    }
    write_json(RECORD, record)
    draw(runs, (ROOT / PAGE).with_suffix(".svg"))
    page = ROOT / PAGE
    page.write_text(fill(PAGE, page.read_text()))
    print(gdpo.differences_table(json.loads(RECORD.read_text())))
    print(f"written: {RECORD}, {page} and its .svg")


if __name__ == "__main__":
    run(main)
