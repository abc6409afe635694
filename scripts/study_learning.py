"""Ways of learning compared on the demo's task: docs/studies/{opd,ppo,lora,fp8,rpg}.md.

    python scripts/study_learning.py rpg            # run what is missing, then write the results
    python scripts/study_learning.py rpg --report   # write the results of finished runs

One run per arm and seed, all from the shelf's primed model; at equal seeds they meet the same prompts in one order.
A run takes about 3 minutes of a core that does nothing else; interrupted, the same command goes on. Written are

    benchmarks/studies/NAME.json   every run's curves and figures, and intervals over seeds
    docs/studies/NAME.svg          the curves
    docs/studies/NAME.md           the tables between its markers
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from readme_tables import fill
from scaling.record import circumstances, new_figure, run, write_json
from studies import learning, plot
from studies.learning import STUDIES, Study
from studies.runs import ROOT, run_missing, trained_by

FOLDER = Path("runs/studies/learning")
WINDOW = 5  # rounds over which the plotted curves are averaged


def draw(study: Study, runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Right answers over rounds and over generated tokens, and the KL to the start."""
    curves = {arm: {r["seed"]: r["curves"] for r in runs if r["arm"] == arm} for arm in study.arms}
    figure = new_figure(11, 3.2, "Right answers among the completions of each round")
    by_round, by_token, *more = figure.subplots(1, 3 if study.kl else 2)
    answers = {arm: {seed: found["answer"] for seed, found in seeds.items()} for arm, seeds in curves.items()}
    plot.band(by_round, answers, WINDOW)
    plot.tidy(by_round, "right answers", f"round (running means over {WINDOW})")
    plot.band(by_token, answers, WINDOW, x=[tokens(seeds) for seeds in curves.values()])
    plot.tidy(by_token, "right answers", "generated tokens (millions)")
    for ax in more:
        plot.band(ax, {arm: {s: f["kl"] for s, f in seeds.items()} for arm, seeds in curves.items()}, WINDOW)
        plot.tidy(ax, "KL to the start (nats per token)", "round")
    by_round.legend(fontsize=8, frameon=False)
    plot.save_svg(figure, path)


def tokens(seeds: Mapping[int, Mapping[str, Sequence[float]]]) -> list[float]:
    """Generated up to each round, mean over seeds, in millions."""
    return (np.mean([found["tokens"] for found in seeds.values()], axis=0) / 1e6).tolist()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(STUDIES))
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--train", metavar="ARM", nargs="*", help="only train, all arms or these, and write nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--rounds", type=int, default=40, help="of each run (40)")
    args = parser.parse_args(argv)
    study = STUDIES[args.name]
    # seed by seed, so that an interrupted study has whole pairs
    trainings = {
        (arm, seed): learning.training(overrides, seed, args.rounds)
        for seed in args.seeds
        for arm, overrides in study.arms.items()
    }
    if not args.report:
        run_missing([t for (arm, _), t in trainings.items() if not args.train or arm in args.train], FOLDER)
    if args.train is not None:
        return
    if missing := [found.name for found in trainings.values() if not found.done(ROOT / FOLDER)]:
        raise SystemExit(f"{len(missing)} trainings are not done ({missing[0]}, ...); type it without --report")
    folders = {pair: ROOT / FOLDER / found.name / found.last for pair, found in trainings.items()}
    runs = [learning.measure(study, *pair, folder) for pair, folder in folders.items()]
    record = {
        **circumstances("cpu"),
        "commits": sorted({trained_by(folder) for folder in folders.values()}),
        "settings": {"seeds": args.seeds, "rounds": args.rounds, "common": learning.COMMON, "arms": study.arms},
        "summary": learning.summary(study, runs),
        "runs": runs,
    }
    write_json(learning.RECORDS / f"{args.name}.json", record)
    page = f"docs/studies/{args.name}.md"
    draw(study, runs, (ROOT / page).with_suffix(".svg"))
    (ROOT / page).write_text(fill(page, (ROOT / page).read_text()))
    print(learning.differences_table(args.name))
    print(f"written: benchmarks/studies/{args.name}.json, {page} and its .svg")


if __name__ == "__main__":
    run(main)
