"""Pretraining in FP8 against bfloat16 at the same seed and data: docs/studies/fp8.md.

    python scripts/study_fp8.py             # run what is missing, then write the results
    python scripts/study_fp8.py --report    # write the results of finished runs

The shelf's model, its experiments' pretraining, with `kernels=fp8_emulated`: the numbers of FP8 kernels (E4M3 and block
scales in all three products of every linear layer and expert; embedding, head, gates, norms and attention stay), at the
speed of a CPU. The bound is DeepSeek-V3's: a relative difference of the loss below 0.25% (2412.19437 section 3.3).
Written are benchmarks/studies/fp8_pretraining.json, docs/studies/fp8_pretraining.svg and the tables of the page.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme_tables import fill
from scaling.record import circumstances, new_figure, run, write_json
from studies import plot
from studies.fp8 import BOUND, RECORD, TAIL, WARMUP, pretraining_table, summary
from studies.runs import ROOT, Training, curve, run_missing, trained_by

FOLDER = Path("runs/studies/fp8")
COMMON = ("experiment=arith_from_scratch", "stages=[pretrain]", "callbacks.checkpoint.every_n_train_steps=1000000")
ARMS: dict[str, tuple[str, ...]] = {
    "bfloat16": (),
    "FP8": ("kernels=fp8_emulated",),
}
PAGE = "docs/studies/fp8.md"


def training(arm: str, seed: int, steps: int) -> Training:
    name = f"{arm.replace(', ', '-').replace(' ', '_')}-{steps}-{seed}"
    return Training(name, (*COMMON, *ARMS[arm], f"pretrain.trainer.max_steps={steps}", f"seed={seed}"), "pretrain")


def draw(losses: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """Losses, and their relative difference over running means."""
    figure = new_figure(9, 3.2, "Pretraining in FP8 and in bfloat16")
    loss, difference = figure.subplots(1, 2)
    plot.band(loss, losses, WARMUP // 2)
    plot.tidy(loss, "loss (nats)", f"step (running means over {WARMUP // 2})")
    base = losses["bfloat16"]
    relative = {
        arm: {seed: _percent_over(curve, base[seed]) for seed, curve in runs.items()}
        for arm, runs in losses.items()
        if arm != "bfloat16"
    }
    plot.band(difference, relative, 1, plot.COLOURS[1:])
    for sign in (-1, 1):
        difference.axhline(sign * 100 * BOUND, color=plot.GREY, linewidth=0.8, linestyle="--")
    plot.tidy(difference, "minus bfloat16's (%)", f"step (means over the last {TAIL})")
    loss.legend(fontsize=8, frameon=False)
    plot.save_svg(figure, path)


def _percent_over(losses: Sequence[float], base: Sequence[float]) -> list[float]:
    return [100 * (a / b - 1) for a, b in zip(_smooth(losses), _smooth(base), strict=True)]


def _smooth(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, end - TAIL) : end]) for end in range(WARMUP, len(losses) + 1)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--steps", type=int, default=600, help="(600)")
    args = parser.parse_args(argv)
    trainings = {(arm, seed): training(arm, seed, args.steps) for seed in args.seeds for arm in ARMS}
    if not args.report:
        run_missing(list(trainings.values()), FOLDER)
    if missing := [found.name for found in trainings.values() if not found.done(ROOT / FOLDER)]:
        raise SystemExit(f"{len(missing)} trainings are not done ({missing[0]}, ...); type it without --report")
    folders = {pair: ROOT / FOLDER / found.name / "pretrain" for pair, found in trainings.items()}
    losses = {arm: {seed: curve(folders[arm, seed], "loss") for seed in args.seeds} for arm in ARMS}
    record: dict[str, Any] = {
        **circumstances("cpu"),
        "commits": sorted({trained_by(folder) for folder in folders.values()}),
        "settings": {"seeds": args.seeds, "steps": args.steps, "common": COMMON, "arms": ARMS},
        "summary": summary(losses),
        "losses": losses,
    }
    write_json(RECORD, record)
    draw(losses, ROOT / "docs" / "studies" / "fp8_pretraining.svg")
    (ROOT / PAGE).write_text(fill(PAGE, (ROOT / PAGE).read_text()))
    print(pretraining_table())


if __name__ == "__main__":
    run(main)
