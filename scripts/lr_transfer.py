"""Learning-rate transfer: does the best learning rate of a narrow model stay the best of a wide one?

    python scripts/lr_transfer.py --widths 64 128 256 512 --optimizers adamw muon --seeds 2
    python scripts/lr_transfer.py --widths 128 256 512 1024 --base-width 256 --steps 1000 --batch 64 --seq-len 256
    python scripts/lr_transfer.py --schemes mup --log2-lrs -10 -9 -8 -7

Trains every width of a ladder (`scripts/scaling/ladder.py`) at learning rates one octave apart, on the source of
Python's standard library as bytes: linear warm-up, linear decay to 5%. Where the best rate lies on the grid's edge the
grid grows by itself. An optimum is the vertex of the parabola through the best rate and its two neighbours, per seed,
then averaged over seeds. Seeds share weights and batches between rates, so that their noise cancels. Schemes: `mup`,
and the control `sp`, whose initial spreads and rates are the base width's at every width.

Each run is appended to `benchmarks/mup/<name>.jsonl` as it ends, and never made twice: start the script again to go on
after an interruption, or to add widths, rates or seeds. Prints, and writes to `<name>.json` and `.png`:

    optimum     log2 of the best learning rate at the base width's scale, mean over seeds, +- standard error
    shift       octaves from the first width's optimum
    gap         loss at the base width's optimum minus this width's own best (nats)
    wider       whether a wider model is at least as good at every common rate up to the base width's optimum
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from scaling.ladder import SCHEMES, Ladder, optimizer_config, recipe
from scaling.record import FOLDER, circumstances, new_figure, run, standard_error, write_json
from scaling.text import digest, source_rows
from scaling.training import VALIDATION_ROWS, train, validation_loss, whole_schedule
from torch import Tensor

from lit_reason.report.picture import COLOURS, GREY

TAIL = 0.125  # share of the steps whose mean training loss counts
MOST_OCTAVES = 4  # that a grid may grow on either side
ROUTER_BIAS_RATE = 1e-3

Curve = dict[int, float]  # log2 learning rate -> loss (nats), infinite where it diverged


@dataclass(frozen=True)
class Run:
    """One training; `settings` are those that must agree for two runs to be compared."""

    scheme: str
    optimizer: str
    width: int
    log2_lr: int
    seed: int
    settings: str

    def losses(self, args: argparse.Namespace, rows_NT: Tensor) -> dict[str, float]:
        """`{"train": mean over the last steps, "val": on rows that no run trains on}` in nats."""
        ladder = Ladder(args.base_width, args.depth, seq_len=args.seq_len, branch_gain=args.branch_gain)
        model = ladder.model(self.width, args.depth, self.scheme, self.seed).to(args.device)
        optimizer = recipe(self.optimizer, 2.0**self.log2_lr, tuple(args.set), **whole_schedule(args.steps))
        losses = []
        for loss in train(
            model,
            optimizer,
            rows_NT[:-VALIDATION_ROWS],
            steps=args.steps,
            batch=args.batch,
            seed=self.seed,
            precision=args.precision,
            alpha=model.config.balance_loss,
            bias_rate=ROUTER_BIAS_RATE,
        ):
            losses.append(loss)
            if not math.isfinite(loss):
                return {"train": math.inf, "val": math.inf}
        tail = losses[-max(1, int(TAIL * args.steps)) :]
        val = validation_loss(model, rows_NT[-VALIDATION_ROWS:], args.batch, args.precision)
        found = {"train": statistics.fmean(tail), "val": val}
        return found if math.isfinite(found["val"]) else {"train": math.inf, "val": math.inf}


class Results:
    """The runs that are done, in a JSONL file that grows by a line per run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[Run, dict[str, float]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of an interrupted run
                print(f"{path}: left out a damaged line: {line[:60]!r}", file=sys.stderr)
                continue
            losses = {key: math.inf if value is None else value for key, value in record["losses"].items()}
            self.done[Run(**record["run"])] = losses
        if text and not text.endswith("\n"):
            self._append("\n")

    def add(self, run: Run, losses: Mapping[str, float], seconds: float, made: Mapping[str, Any]) -> None:
        self.done[run] = dict(losses)
        plain = {key: value if math.isfinite(value) else None for key, value in losses.items()}
        self._append(json.dumps({"run": asdict(run), "losses": plain, "seconds": round(seconds, 2), **made}) + "\n")

    def _append(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def curves(self, scheme: str, optimizer: str, width: int, settings: str, metric: str) -> dict[int, Curve]:
        """The loss by rate of each seed."""
        found: dict[int, Curve] = {}
        for done, losses in sorted(self.done.items(), key=lambda item: item[0].log2_lr):
            if (done.scheme, done.optimizer, done.width, done.settings) == (scheme, optimizer, width, settings):
                found.setdefault(done.seed, {})[done.log2_lr] = losses[metric]
        return found


@dataclass(frozen=True)
class Optimum:
    """Of one curve.

    Args:
        log2_lr: where the parabola through the best rate and its neighbours has its vertex.
        loss: there.
        resolved: False where the best rate has no finite neighbour on one side, and stands for the vertex itself.
    """

    log2_lr: float
    loss: float
    resolved: bool


def optimum(curve: Curve) -> Optimum:
    best = min(curve, key=lambda rate: curve[rate])
    low, high = (curve.get(best + side, math.inf) for side in (-1, 1))
    bend = low + high - 2 * curve[best]
    if not math.isfinite(bend) or bend <= 0:
        return Optimum(float(best), curve[best], False)
    offset = (low - high) / (2 * bend)
    return Optimum(best + offset, curve[best] - bend * offset**2 / 2, True)


def loss_at(curve: Curve, log2_lr: float) -> float:
    """By the parabola through the three measured rates nearest to `log2_lr`; infinite where one of them diverged."""
    x = sorted(curve, key=lambda rate: abs(rate - log2_lr))[:3]
    weights = [math.prod((log2_lr - b) / (a - b) for b in x if b != a) for a in x]
    losses = [curve[rate] for rate in x]
    return sum(w * y for w, y in zip(weights, losses, strict=True)) if all(map(math.isfinite, losses)) else math.inf


def summary(curves: Mapping[int, Mapping[int, Curve]], base_width: int) -> dict[str, Any]:
    """Optimum, shift and gap per width of one scheme and optimizer; `curves[width][seed]`."""
    widths = sorted(curves)
    base = base_width if base_width in curves else widths[0]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in curves.values())))
    best = {width: {seed: optimum(curves[width][seed]) for seed in seeds} for width in widths}
    rows = {}
    for width in widths:
        shifts = [best[width][s].log2_lr - best[widths[0]][s].log2_lr for s in seeds]
        gaps = [loss_at(curves[width][s], best[base][s].log2_lr) - best[width][s].loss for s in seeds]
        rows[width] = {
            "log2_lr": statistics.fmean(best[width][s].log2_lr for s in seeds),
            "log2_lr_se": standard_error([best[width][s].log2_lr for s in seeds]),
            "shift": statistics.fmean(shifts),
            "shift_se": standard_error(shifts),
            "loss": statistics.fmean(best[width][s].loss for s in seeds),
            "gap": statistics.fmean(gaps),
            "resolved": all(best[width][s].resolved for s in seeds),
        }
    limit = statistics.fmean(best[base][s].log2_lr for s in seeds)
    return {"base": base, "seeds": seeds, "widths": rows, "wider": wider_is_better(curves, limit)}


def wider_is_better(curves: Mapping[int, Mapping[int, Curve]], log2_limit: float) -> bool | None:
    """At every rate up to 2^log2_limit that all widths have, seeds averaged; None without such a rate."""
    means = {width: _mean_curve(by_seed) for width, by_seed in sorted(curves.items())}
    rates = [r for r in set.intersection(*(set(mean) for mean in means.values())) if r <= log2_limit]
    ordered = list(means.values())
    pairs = [(a[rate], b[rate]) for rate in rates for a, b in itertools.pairwise(ordered)]
    return all(wide <= narrow for narrow, wide in pairs) if pairs else None


def _mean_curve(by_seed: Mapping[int, Curve]) -> Curve:
    rates = set.intersection(*(set(curve) for curve in by_seed.values()))
    return {rate: statistics.fmean(curve[rate] for curve in by_seed.values()) for rate in sorted(rates)}


def next_rate(mean: Curve, grid: Sequence[int]) -> int | None:
    """The rate that the grid lacks because its best lies on the edge; None when it does not, or grew enough."""
    best = min(mean, key=lambda rate: mean[rate])
    if not math.isfinite(mean[best]):
        return min(mean) - 1 if min(mean) > min(grid) - MOST_OCTAVES else None
    if best == min(mean):
        return best - 1 if best > min(grid) - MOST_OCTAVES else None
    return best + 1 if best == max(mean) < max(grid) + MOST_OCTAVES else None


def sweep(args: argparse.Namespace, results: Results, settings: str) -> None:
    """Trains what is missing, narrow models first."""
    rows_NT = source_rows(args.seq_len).to(args.device)
    made = circumstances(args.device)

    def ensure(scheme: str, optimizer: str, width: int, log2_lr: int) -> None:
        for seed in range(args.seeds):
            run = Run(scheme, optimizer, width, log2_lr, seed, settings)
            if run not in results.done:
                start = time.perf_counter()
                losses = run.losses(args, rows_NT)
                results.add(run, losses, time.perf_counter() - start, made)
                took = time.perf_counter() - start
                print(
                    f"{optimizer} {scheme} width {width} lr 2^{log2_lr} seed {seed}: {args.metric} "
                    f"{losses[args.metric]:.4f}, {took:.1f} s",
                    flush=True,
                )

    for width in sorted(args.widths):
        for optimizer in args.optimizers:
            for scheme in args.schemes:
                grid = args.log2_lrs or default_grid(optimizer, args.set)
                for rate in grid:
                    ensure(scheme, optimizer, width, rate)
                seeds = range(args.seeds)
                while True:
                    curves = results.curves(scheme, optimizer, width, settings, args.metric)
                    rate = next_rate(_mean_curve({seed: curves[seed] for seed in seeds}), grid)
                    if rate is None:
                        break
                    ensure(scheme, optimizer, width, rate)


def default_grid(optimizer: str, settings: Sequence[str]) -> list[int]:
    """Two octaves on either side of the optimizer file's rate."""
    centre = round(math.log2(optimizer_config(optimizer, tuple(settings))["lr"]))
    return list(range(centre - 2, centre + 3))


def print_table(summaries: Mapping[str, dict[str, Any]]) -> None:
    table = Table("optimizer, scheme", "width", "log2 lr*", "shift", "best loss", "gap", "")
    for name, found in summaries.items():
        for width, row in found["widths"].items():
            note = "" if row["resolved"] else "edge of the grid"
            rate, shift = (f"{row[key]:+.2f} ± {row[f'{key}_se']:.2f}" for key in ("log2_lr", "shift"))
            table.add_row(name, str(width), rate, shift, f"{row['loss']:.4f}", f"{row['gap']:.4f}", note)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for name, found in summaries.items():
        says = {True: "yes", False: "NO", None: "no rate in common"}[found["wider"]]
        print(f"{name}: wider is better at every rate up to the optimum of width {found['base']}: {says}")


def draw(curves: Mapping[str, Mapping[int, Mapping[int, Curve]]], title: str, label: str, path: Path) -> None:
    """Loss against log2 learning rate, a panel per optimizer and scheme, a curve per width."""
    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = new_figure(max(7, 5.5 * columns), 4 * rows, title)
    shared: Axes | None = None
    for index, (name, by_width) in enumerate(curves.items()):
        ax = figure.add_subplot(rows, columns, index + 1, sharey=shared)
        shared = shared or ax
        for width, colour in zip(sorted(by_width), COLOURS * 4, strict=False):
            mean = {rate: loss for rate, loss in _mean_curve(by_width[width]).items() if math.isfinite(loss)}
            ax.plot(list(mean), list(mean.values()), marker="o", markersize=3, color=colour, label=str(width))
            best = [optimum(curve) for curve in by_width[width].values()]
            x, y = (statistics.fmean(getattr(o, key) for o in best) for key in ("log2_lr", "loss"))
            ax.plot([x], [y], marker="*", markersize=10, color=colour)
        ax.set_title(name, loc="left", fontsize=10, fontweight="bold")
        ax.set_xlabel("log2 learning rate at the base width", fontsize=9, color=GREY)
        ax.set_ylabel(label, fontsize=9, color=GREY)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.tick_params(labelsize=8, colors=GREY)
        ax.legend(fontsize=8, frameon=False, title="width", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def settings_of(args: argparse.Namespace) -> str:
    """What two runs must share to be compared, as one string."""
    keys = ("base_width", "depth", "branch_gain", "steps", "batch", "seq_len", "precision", "set")
    shared = {key: getattr(args, key) for key in keys} | {"text": digest(source_rows(args.seq_len))}
    return json.dumps(shared | {"device": args.device.partition(":")[0]}, sort_keys=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[64, 128, 256])
    add("--base-width", type=int, help="where the rates are meant (the smallest width)")
    add("--depth", type=int, default=3, help="(3)")
    add("--branch-gain", type=float, default=1.0, help="of ModelConfig; 0: every block starts as the identity (1)")
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="(mup sp)")
    add("--optimizers", nargs="+", default=["adamw"], help="names of conf/optimizer (adamw)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of every optimizer, e.g. weight_decay=0")
    add("--log2-lrs", type=int, nargs="+", help="the grid (two octaves around the optimizer file's rate)")
    add("--steps", type=int, default=120, help="(120)")
    add("--batch", type=int, default=8, help="rows of text per step (8)")
    add("--seq-len", type=int, default=64, help="tokens per row (64)")
    add("--seeds", type=int, default=2, help="of weights and batches (2)")
    add("--metric", choices=["val", "train"], default="val", help="the loss that decides (val)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32", help="autocast, or not")
    add("--out", type=Path, default=FOLDER, help="folder of the files (benchmarks/mup)")
    add("--name", default="lr_transfer", help="of the files (lr_transfer)")
    args = parser.parse_args(argv)
    args.base_width = args.base_width or min(args.widths)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for name in args.optimizers:
        optimizer_config(name, tuple(args.set))  # a wrong name is told before anything is trained
    results, settings = Results(args.out / f"{args.name}.jsonl"), settings_of(args)
    sweep(args, results, settings)
    curves = {
        f"{optimizer}, {scheme}": {
            width: results.curves(scheme, optimizer, width, settings, args.metric) for width in sorted(args.widths)
        }
        for optimizer in args.optimizers
        for scheme in args.schemes
    }
    summaries = {name: summary(by_width, args.base_width) for name, by_width in curves.items()}
    print_table(summaries)
    path = args.out / f"{args.name}.json"
    shown = {key: value for key, value in vars(args).items() if key not in ("out", "name")}
    record = {**circumstances(args.device), "settings": shown, "summary": summaries, "curves": curves}
    write_json(path, record | {"text": digest(source_rows(args.seq_len))})
    tokens = args.steps * args.batch * args.seq_len
    title = f"Learning-rate transfer: {args.steps} steps, {tokens:,} tokens, {args.seeds} seeds"
    draw(curves, title, f"{args.metric} loss (nats)", path.with_suffix(".png"))
    print(f"written to {path} and .png")
    return 0


if __name__ == "__main__":
    run(main)
