"""Coordinate check: do activations and updates move as far in a wide (or deep) model as in a narrow one?

    python scripts/coord_check.py --check                                  # AdamW, muP and its control, widths 64-512
    python scripts/coord_check.py --optimizer muon --check
    python scripts/coord_check.py --depths 3 6 12 24 --width 64 --branch-gain 0 --check
    python scripts/coord_check.py --optimizer adamw --set weight_decay=0

Every model of a ladder (`scripts/scaling/ladder.py`) takes the same few steps on one batch of real text, at a quarter
of the optimizer file's learning rate unless --lr says otherwise: the check is about small first steps. After each step
the script measures rms(h_t - h_0) of the hidden quantities (of the residual stream, after the last block) and
rms((W_t - W_0) x_t) of every matrix (`lit_reason.models.coord`), and fits the slope of their log2 (RMS over layers,
geometric mean over seeds) against log2 of the size. Schemes: `mup`, and the control `sp`, whose initial spreads and
rates are the base width's at every width. Prints a table; writes `benchmarks/mup/<name>.json` and `.png`.

Limits of |slope| after the last step:
    change of hidden quantities                 0.10, and 0.20 where the base width is below 256
    effective updates                           0.15
    effective updates of W_UK                   0.30 (queries and keys are suppressed in the first steps, 2405.15712)
    change of router and head logits            none: judged by the effective updates
    the control                                 some hidden quantity must show +0.4 or more

Exit status: 0; with --check 1 when a limit is violated or the control stays flat.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from scaling.ladder import SCHEMES, Ladder, optimizer_config, recipe
from scaling.record import FOLDER, circumstances, new_figure, run, write_json
from scaling.text import digest, source_rows
from torch import Tensor

from lit_reason.models import Transformer
from lit_reason.models.coord import CoordinateProbe, by_kind, slope
from lit_reason.optim import OptimizerRecipe
from lit_reason.report.picture import COLOURS, GREY

LOGITS = ("router_logits", "head_logits")
LIMIT_HIDDEN, LIMIT_HIDDEN_TOY, TOY_BELOW = 0.10, 0.20, 256
LIMIT_UPDATE, LIMIT_UPDATE_UK = 0.15, 0.30
CONTROL = 0.4


@dataclass(frozen=True)
class Measurement:
    """One model after one step: RMS by `kind/module`."""

    scheme: str
    size: int
    seed: int
    step: int
    loss: float
    change: dict[str, float]
    update: dict[str, float]


@dataclass(frozen=True)
class Slope:
    """One row of the table.

    Args:
        measure: `"change"` or `"update"`.
        name: a kind, or `kind/module`.
        value: slope of the geometric mean over seeds.
        by_seed: each seed's own slope.
        limit: on |value|; None where the row is not judged by itself.
    """

    scheme: str
    measure: str
    name: str
    value: float
    by_seed: list[float]
    limit: float | None

    @property
    def ok(self) -> bool:
        return self.limit is None or abs(self.value) <= self.limit


def train(model: Transformer, recipe: OptimizerRecipe, batch_BT: Tensor, steps: int) -> list[tuple[float, Any]]:
    """(loss before the step, coordinates after it) of each of `steps` steps on one batch."""
    optimizer, _ = recipe.build(model, steps)
    inputs_BT, targets_BT = batch_BT[:, :-1], batch_BT[:, 1:]
    probe = CoordinateProbe(model, lambda: model(inputs_BT))
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs_BT).flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((loss.item(), probe.measure()))
    return found


def ladder_of(args: argparse.Namespace) -> Ladder:
    return Ladder(args.base_width, args.base_depth, seq_len=args.seq_len, branch_gain=args.branch_gain)


def measure(args: argparse.Namespace) -> list[Measurement]:
    """Every model of the ladder, with a line for each."""
    ladder = ladder_of(args)
    rows_NT = source_rows(args.seq_len)
    found = []
    for scheme in args.schemes:
        for size in args.sizes:
            width, depth = (args.width, size) if args.depths else (size, args.depth)
            for seed in range(args.seeds):
                start = time.perf_counter()
                model = ladder.model(width, depth, scheme, seed).to(args.device)
                batch_BT = rows_NT[seed * args.batch : (seed + 1) * args.batch].to(args.device)
                optimizer = recipe(args.optimizer, args.lr, tuple(args.set), schedule="constant", warmup_steps=0)
                for step, (loss, at) in enumerate(train(model, optimizer, batch_BT, args.steps), 1):
                    change = where_it_ends(at.change, depth)
                    found.append(Measurement(scheme, size, seed, step, loss, change, at.update))
                took = time.perf_counter() - start
                print(f"{scheme} {args.axis} {size} seed {seed}: loss {loss:.3f}, {took:.1f} s", flush=True)
    return found


def where_it_ends(change: Mapping[str, float], depth: int) -> dict[str, float]:
    """`change` without the residual stream after blocks before the last: 1 of 3 blocks is not 1 of 24."""
    last = f"residual/blocks.{depth - 1}"
    return {name: value for name, value in change.items() if not name.startswith("residual/") or name == last}


def fit(measurements: Sequence[Measurement], step: int, limit_hidden: float, modules: bool = False) -> list[Slope]:
    """The slopes after `step`, by kind or by `kind/module`: of names that every size has."""
    found = []
    for scheme in dict.fromkeys(m.scheme for m in measurements):
        here = [m for m in measurements if m.scheme == scheme and m.step == step]
        sizes, seeds = (sorted({getattr(m, key) for m in here}) for key in ("size", "seed"))
        for kind in ("change", "update"):
            values = {(m.size, m.seed): getattr(m, kind) for m in here}
            values = values if modules else {key: by_kind(value) for key, value in values.items()}
            for name in values[sizes[0], seeds[0]]:
                if all(name in value for value in values.values()):
                    means = [_geometric_mean([values[size, seed][name] for seed in seeds]) for size in sizes]
                    by_seed = [slope(sizes, [values[size, seed][name] for size in sizes]) for seed in seeds]
                    limit = None if scheme == "sp" or modules else limit_of(kind, name, limit_hidden)
                    found.append(Slope(scheme, kind, name, slope(sizes, means), by_seed, limit))
    return found


def limit_of(measure: str, kind: str, limit_hidden: float) -> float | None:
    if measure == "update":
        return LIMIT_UPDATE_UK if kind == "W_UK" else LIMIT_UPDATE
    return None if kind in LOGITS else limit_hidden


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if min(values) > 0 else math.nan


def verdict(slopes: Sequence[Slope]) -> list[str]:
    """What is violated, one line each."""
    wrong = [f"{s.scheme} {s.measure} {s.name}: slope {s.value:+.3f}, limit {s.limit:.2f}" for s in slopes if not s.ok]
    control = [s.value for s in slopes if s.scheme == "sp" and s.measure == "change" and s.name not in LOGITS]
    if control and not max(control) >= CONTROL:
        wrong.append(f"the control's steepest hidden quantity has slope {max(control):+.3f}, expected {CONTROL:+.1f}")
    return wrong


def print_table(slopes: Sequence[Slope]) -> None:
    table = Table("scheme", "measure", "quantity", "slope", "per seed", "limit", "")
    for s in slopes:
        seeds = " ".join(f"{value:+.2f}" for value in s.by_seed)
        limit = "" if s.limit is None else f"{s.limit:.2f}"
        table.add_row(s.scheme, s.measure, s.name, f"{s.value:+.3f}", seeds, limit, "" if s.ok else "VIOLATED")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(measurements: Sequence[Measurement], slopes: Sequence[Slope], axis: str, title: str, path: Path) -> None:
    """Log2 RMS against the size after the last step, a row per scheme."""
    schemes = list(dict.fromkeys(m.scheme for m in measurements))
    figure = new_figure(11, 4.2 * len(schemes), title)
    for row, scheme in enumerate(schemes):
        for column, (kind, label) in enumerate((("change", "rms(h_t - h_0)"), ("update", "rms((W_t - W_0) x_t)"))):
            ax = figure.add_subplot(len(schemes), 2, 2 * row + column + 1)
            _panel(ax, [m for m in measurements if m.scheme == scheme], [s for s in slopes if s.scheme == scheme], kind)
            ax.set_title(f"{scheme}: {label}", loc="left", fontsize=10, fontweight="bold")
            ax.set_xlabel(axis, fontsize=9, color=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(ax: Axes, measurements: Sequence[Measurement], slopes: Sequence[Slope], measure: str) -> None:
    sizes = sorted({m.size for m in measurements})
    for index, s in enumerate(s for s in slopes if s.measure == measure):
        points = [[by_kind(getattr(m, measure))[s.name] for m in measurements if m.size == size] for size in sizes]
        style = ("-", "--", ":")[index // len(COLOURS)]
        means = [_geometric_mean(values) for values in points]
        colour = COLOURS[index % len(COLOURS)]
        ax.plot(sizes, means, style, marker="o", markersize=3, color=colour, label=f"{s.name} {s.value:+.2f}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.tick_params(labelsize=8, colors=GREY)
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)


def to_record(args: argparse.Namespace, measurements: Sequence[Measurement], limit_hidden: float) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    last = [m for m in measurements if m.step == args.steps]
    settings = {key: value for key, value in vars(args).items() if key not in ("check", "out", "name")}
    slopes = fit(measurements, args.steps, limit_hidden)
    return {
        **circumstances(args.device),
        "settings": settings | {"recipe": str(recipe(args.optimizer, args.lr, tuple(args.set)))},
        "ladder": asdict(ladder_of(args)),
        "text": digest(source_rows(args.seq_len)),
        "limits": {"hidden": limit_hidden, "update": LIMIT_UPDATE, "update_W_UK": LIMIT_UPDATE_UK, "control": CONTROL},
        "violations": verdict(slopes),
        "slopes": [asdict(s) for s in slopes],
        "slopes_by_step": {step: _nested(fit(measurements, step, limit_hidden)) for step in range(1, args.steps + 1)},
        "slopes_by_module": _nested(fit(measurements, args.steps, limit_hidden, modules=True)),
        "rms": [asdict(m) | {"change": by_kind(m.change), "update": by_kind(m.update)} for m in last],
    }


def _nested(slopes: Sequence[Slope]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for s in slopes:
        found.setdefault(s.scheme, {}).setdefault(s.measure, {})[s.name] = s.value
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    add("--depths", type=int, nargs="+", help="a ladder of depths at --width instead")
    add("--width", type=int, default=128, help="with --depths (128)")
    add("--depth", type=int, default=3, help="with --widths (3)")
    add("--base-width", type=int, help="(the smallest width)")
    add("--base-depth", type=int, help="(the smallest depth)")
    add("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="(mup sp)")
    add("--optimizer", default="adamw", help="a name of conf/optimizer (adamw)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the optimizer, e.g. weight_decay=0")
    add("--lr", type=float, help="at the base width (a quarter of the optimizer file's)")
    add("--steps", type=int, default=8, help="(8)")
    add("--seeds", type=int, default=2, help="of weights and text (2)")
    add("--batch", type=int, default=8, help="rows of text (8)")
    add("--seq-len", type=int, default=64, help="tokens per row (64)")
    add("--branch-gain", type=float, default=1.0, help="of ModelConfig; 0: every block starts as the identity (1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=FOLDER, help="folder of the JSON and the PNG (benchmarks/mup)")
    add("--name", help="of both files (coord_<axis>_<optimizer>, and the gain if not 1)")
    add("--check", action="store_true", help="exit with 1 when a limit is violated")
    args = parser.parse_args(argv)
    args.axis, args.sizes = ("depth", args.depths) if args.depths else ("width", args.widths)
    if len(set(args.sizes)) < 2:
        parser.error(f"--{args.axis}s {args.sizes}: a slope needs two sizes, e.g. 64 128 256 512")
    args.base_width = args.base_width or (args.width if args.depths else min(args.sizes))
    args.base_depth = args.base_depth or (min(args.sizes) if args.depths else args.depth)
    args.lr = args.lr or optimizer_config(args.optimizer, tuple(args.set))["lr"] / 4  # a wrong name is told here
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    limit_hidden = LIMIT_HIDDEN if args.base_width >= TOY_BELOW else LIMIT_HIDDEN_TOY
    measurements = measure(args)
    record = to_record(args, measurements, limit_hidden)
    slopes = fit(measurements, args.steps, limit_hidden)
    print_table(slopes)
    gain = "" if args.branch_gain == 1 else f"_gain{args.branch_gain:g}"
    path = args.out / f"{args.name or f'coord_{args.axis}_{args.optimizer}{gain}'}.json"
    write_json(path, record)
    title = f"Coordinate check over the {args.axis}: {args.optimizer}, lr {args.lr:.2g}, step {args.steps}"
    draw(measurements, slopes, args.axis, title, path.with_suffix(".png"))
    print(f"written to {path} and .png")
    for line in record["violations"]:
        print(f"VIOLATED: {line}")
    return int(args.check and bool(record["violations"]))


if __name__ == "__main__":
    run(main)
