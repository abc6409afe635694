"""Pretraining in FP8 against bfloat16 at the same seed and data: docs/studies/fp8.md.

    python scripts/study_fp8.py PATH/gsm8k/train.jsonl     # runs what is missing, then writes all that was run
    python scripts/study_fp8.py PATH/gsm8k/train.jsonl --rates 0.001 --seeds 4 5 6

The shelf's model (conf/model/arith_1m.yaml) reads the questions and solutions of a JSONL file, byte by byte. FP8 is
`kernels=fp8_emulated`: the numbers of FP8 kernels (E4M3 and block scales in all three products of every linear layer
and expert; embedding, head, gates, norms and attention stay), at the speed of a CPU. The bound is DeepSeek-V3's: a
relative difference of the loss below 0.25% (2412.19437 section 3.3). A third arm, bfloat16 with other kernels
(`kernels=auto`), says how far rounding alone drives two runs apart: further at higher learning rates.

Written are benchmarks/studies/fp8_pretraining.json, docs/studies/fp8_pretraining.svg and the table of the page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from readme_tables import fill
from scaling.record import circumstances, new_figure, run, write_json
from studies import plot
from studies.fp8 import BOUND, RECORD, TAIL, WARMUP, pretraining_table, summary
from studies.runs import ROOT
from torch.utils.data import DataLoader

from lit_reason.cli.build import build
from lit_reason.cli.stages import commit
from lit_reason.config.compose import compose
from lit_reason.data import ByteTokenizer
from lit_reason.models import Transformer
from lit_reason.modules import PretrainModule
from lit_reason.optim import AdamW
from lit_reason.types import TokenBatch

FOLDER = ROOT / "runs" / "studies" / "fp8"
ARMS = {"bfloat16": "torch", "FP8": "fp8_emulated", "bfloat16, other kernels": "auto"}
ROWS, LENGTH = 16, 128  # of a batch
PAGE = "docs/studies/fp8.md"


class Losses(L.Callback):
    """The loss of every step, and how long it will take."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["loss"]))
        if (done := len(self.values)) % 20 == 0:
            left = (time.perf_counter() - self.began) / done * (trainer.max_steps - done)
            print(f"  step {done}/{trainer.max_steps}  loss {self.values[-1]:.4f}  {left:.0f} s left", flush=True)


def batches(path: Path, seed: int, steps: int) -> list[TokenBatch]:
    """Documents in an order of the seed's, packed end to end into rows; each row once."""
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer, generator = ByteTokenizer(), torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for i in torch.randperm(len(documents), generator=generator).tolist():
        ids += [*tokenizer.encode(f"{documents[i]['question']}\n{documents[i]['answer']}\n"), tokenizer.stop_ids[0]]
    needed = steps * ROWS * (LENGTH + 1)
    if len(ids) < needed:
        raise SystemExit(
            f"{path} has {len(ids)} tokens, {needed} are needed. Type --steps {steps * len(ids) // needed}"
        )
    rows = torch.tensor(ids[:needed]).view(steps, ROWS, LENGTH + 1)
    return [TokenBatch(row[:, :-1], row[:, 1:], torch.ones(ROWS, LENGTH)) for row in rows]


def losses(path: Path, rate: float, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """A run's losses and the code's commit; trained if that was not done before."""
    found = place(path, f"{rate:g}", arm, seed, steps)
    if not found.exists():
        print(f"rate {rate:g}, {arm}, seed {seed}", flush=True)
        L.seed_everything(seed, verbose=False)
        cfg = compose("train", ["model=arith_1m", f"kernels={ARMS[arm]}"])
        module = PretrainModule(
            Transformer(build(cfg, "model")), AdamW(lr=rate, schedule="linear", warmup_steps=50, final_fraction=0.03)
        )
        seen, kernels = Losses(), list(build(cfg, "kernels").values()) if cfg.kernels else []
        L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            callbacks=[seen, *kernels],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, DataLoader(batches(path, seed, steps), batch_size=None))  # type: ignore[arg-type]
        write_json(found, {"losses": seen.values, "commit": commit()})
    return json.loads(found.read_text())


def place(path: Path, rate: str, arm: str, seed: int | str, steps: int) -> Path:
    return FOLDER / f"{ARMS[arm]}-{path.stem}-{steps}-{rate}-{seed}.json"


def complete(path: Path, steps: int) -> dict[str, list[int]]:
    """{rate: the seeds of which every arm was run}."""
    names = (file.stem for file in FOLDER.glob(place(path, "*", "FP8", "*", steps).name))
    runs = [tuple(name.split(f"-{steps}-", 1)[1].rsplit("-", 1)) for name in names]
    seeds: dict[str, list[int]] = {}
    for rate, seed in sorted(runs, key=lambda run: (float(run[0]), int(run[1]))):
        if all(place(path, rate, arm, int(seed), steps).exists() for arm in ARMS):
            seeds.setdefault(rate, []).append(int(seed))
    return seeds


def draw(curves: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], path: Path) -> None:
    """The first arm's losses, and for each rate the others' relative difference. {rate: {arm: {seed: losses}}}."""
    figure = new_figure(3 + 2.5 * len(curves), 2.8, "Pretraining in FP8 and in bfloat16")
    loss, *differences = figure.subplots(1, 1 + len(curves))
    plot.band(loss, {f"rate {rate}": next(iter(arms.values())) for rate, arms in curves.items()}, WARMUP // 2)
    plot.tidy(loss, "bfloat16's loss (nats per byte)", f"step (means over {WARMUP // 2})")
    loss.legend(fontsize=6, frameon=False)
    for ax, (rate, arms) in zip(differences, curves.items(), strict=True):
        base, *others = arms
        relative = {
            arm: {seed: _percent_over(curve, arms[base][seed]) for seed, curve in arms[arm].items()} for arm in others
        }
        places = [range(WARMUP + TAIL, WARMUP + TAIL + len(next(iter(runs.values())))) for runs in relative.values()]
        plot.band(ax, relative, 1, plot.COLOURS[1:], places)
        for sign in (-1, 1):
            ax.axhline(sign * 100 * BOUND, color=plot.GREY, linewidth=0.8, linestyle="--")
        plot.tidy(ax, f"minus {base}'s (%), rate {rate}", f"step (means over the last {TAIL})")
        ax.legend(fontsize=6, frameon=False)
    plot.save_svg(figure, path)


def _percent_over(losses: Sequence[float], base: Sequence[float]) -> list[float]:
    return [100 * (a / b - 1) for a, b in zip(_smooth(losses), _smooth(base), strict=True)]


def _smooth(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[end - TAIL : end]) for end in range(WARMUP + TAIL, len(losses) + 1)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a JSONL file with question and answer, e.g. GSM8K's train.jsonl")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.001, 0.002, 0.004], help="(0.001 0.002 0.004)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--steps", type=int, default=520, help="(520)")
    args = parser.parse_args(argv)
    if args.steps < WARMUP + TAIL:
        parser.error(f"--steps {args.steps}: valid: {WARMUP + TAIL} or more")
    if not args.text.is_file():
        parser.error(f"{args.text} is no file; GSM8K's train.jsonl is at https://github.com/openai/grade-school-math")
    for rate in args.rates:
        for seed in args.seeds:
            for arm in ARMS:
                losses(args.text, rate, arm, seed, args.steps)
    seeds = complete(args.text, args.steps)
    runs = {
        rate: {arm: {seed: losses(args.text, float(rate), arm, seed, args.steps) for seed in found} for arm in ARMS}
        for rate, found in seeds.items()
    }
    curves = {
        rate: {arm: {seed: run["losses"] for seed, run in by_seed.items()} for arm, by_seed in arms.items()}
        for rate, arms in runs.items()
    }
    record: dict[str, Any] = {
        **circumstances("cpu"),
        "commits": sorted(
            {run["commit"] for arms in runs.values() for found in arms.values() for run in found.values()}
        ),
        "settings": {"seeds": seeds, "steps": args.steps, "kernels": ARMS, "text": args.text.name},
        "summary": {rate: summary(arms) for rate, arms in curves.items()},
        "losses": curves,
    }
    write_json(RECORD, record)
    draw(curves, ROOT / "docs" / "studies" / "fp8_pretraining.svg")
    (ROOT / PAGE).write_text(fill(PAGE, (ROOT / PAGE).read_text()))
    print(pretraining_table())


if __name__ == "__main__":
    run(main)
