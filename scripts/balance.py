"""Balancing experts: does the bias alone keep them evenly used, and does it cost less than an auxiliary loss?

    python scripts/balance.py
    python scripts/balance.py --experts 64 --experts-per-token 6 --width 256 --seeds 5

Trains one mixture of experts on the source of Python's standard library, as bytes, once per way of balancing:

    bias         biases that only choose, b_i += rate * sign(mean load - load_i) (2408.15664), no auxiliary loss
    loss ALPHA   ALPHA times the sequence-wise balance loss (2412.19437 eq. 17-20), biases frozen at 0
    neither      the control

Prints, and writes to `benchmarks/balance/<name>.json` and `.png`, with means over seeds and their standard errors:

    max violation   max load / mean load - 1 of the worst layer (2408.15664 eq. 4): of a batch, mean over the last tenth
                    of the steps; and of all validation text together
    steps to 0.5    from which step on the mean over 10 batches stays below 0.5, seed by seed
    dead            experts of all layers that no validation token chooses
    val             cross-entropy on held-out text (nats), and its difference to `bias`, paired by seed
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scaling.ladder import Ladder, recipe
from scaling.record import circumstances, new_figure, run, standard_error, write_json
from scaling.text import digest, source_rows
from scaling.training import VALIDATION_ROWS, train, validation_loss, whole_schedule
from torch import Tensor

from lit_reason.callbacks.expert_load import max_violation
from lit_reason.models import Transformer
from lit_reason.report.picture import COLOURS, GREY

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "balance"
LIMIT = 0.5


@dataclass(frozen=True)
class Way:
    """One way of balancing."""

    name: str
    bias_rate: float = 0.0
    alpha: float = 0.0


@dataclass(frozen=True)
class Result:
    """Of one training; `violation` is the worst layer's, batch by batch."""

    way: str
    seed: int
    violation: list[float]
    violation_val: float
    dead: int
    val: float


def measure(way: Way, seed: int, args: argparse.Namespace, rows_NT: Tensor) -> Result:
    ladder = Ladder(args.width, args.depth, 272, args.seq_len, args.experts, args.experts_per_token)
    model = ladder.model(args.width, args.depth, "mup", seed).to(args.device)
    optimizer = recipe(args.optimizer, args.lr, **whole_schedule(args.steps))
    losses = train(
        model,
        optimizer,
        rows_NT[:-VALIDATION_ROWS],
        steps=args.steps,
        batch=args.batch,
        seed=seed,
        precision=args.precision,
        alpha=way.alpha,
        bias_rate=way.bias_rate,
    )
    violation = [max(max_violation(router.load_E) for router in model.routers()) for _ in losses]
    val, loads = validate(model, rows_NT[-VALIDATION_ROWS:], args)
    dead = sum(int((load_E == 0).sum()) for load_E in loads)
    return Result(way.name, seed, violation, max(map(max_violation, loads)), dead, val)


def validate(model: Transformer, rows_NT: Tensor, args: argparse.Namespace) -> tuple[float, list[Tensor]]:
    """(cross-entropy, load_E of each layer) over held-out text."""
    loads = [torch.zeros_like(router.load_E) for router in model.routers()]

    def listen(index: int) -> Any:
        def hook(module: Any, inputs: Any, routing: Any) -> None:
            loads[index] += torch.bincount(routing.experts_NK.flatten(), minlength=args.experts)

        return hook

    handles = [router.register_forward_hook(listen(i)) for i, router in enumerate(model.routers())]
    loss = validation_loss(model, rows_NT, args.batch, args.precision)
    for handle in handles:
        handle.remove()
    return loss, loads


def summary(results: Sequence[Result], ways: Sequence[Way]) -> dict[str, dict[str, Any]]:
    """Mean and standard error over seeds of each figure."""
    reference = {r.seed: r.val for r in results if r.way == ways[0].name}
    found = {}
    for way in ways:
        here = [r for r in results if r.way == way.name]
        tail = max(1, len(here[0].violation) // 10)
        found[way.name] = {
            "max_violation": with_error([statistics.fmean(r.violation[-tail:]) for r in here]),
            "max_violation_val": with_error([r.violation_val for r in here]),
            "steps_to_limit": [steps_to_limit(r.violation) for r in here],
            "dead": sum(r.dead for r in here),
            "val": with_error([r.val for r in here]),
            "val_minus_bias": with_error([r.val - reference[r.seed] for r in here]),
        }
    return found


def steps_to_limit(violation: Sequence[float], window: int = 10) -> int | None:
    """The first step from which the mean over `window` batches stays below `LIMIT`; None if it does not."""
    means = [statistics.fmean(violation[i : i + window]) for i in range(len(violation) - window + 1)]
    above = [i for i, mean in enumerate(means) if mean >= LIMIT]
    first = above[-1] + 1 if above else 0
    return first + window if first < len(means) else None


def with_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error)."""
    return statistics.fmean(values), standard_error(values)


def violations(found: dict[str, dict[str, Any]]) -> list[str]:
    """What the first way, the bias alone, does not keep to; one line each."""
    bias, *others = found.values()
    wrong = [f"the bias leaves {bias['dead']} experts dead"] if bias["dead"] else []
    for key in ("max_violation", "max_violation_val"):
        if not bias[key][0] < LIMIT:
            wrong.append(f"the bias leaves {key} {bias[key][0]:.2f}, limit {LIMIT}")
    for name, other in zip(list(found)[1:], others, strict=True):
        difference, error = other["val_minus_bias"]
        if name.startswith("loss") and difference < -2 * (0.0 if math.isnan(error) else error):
            wrong.append(f"validation loss with {name} is lower than with the bias by {-difference:.4f} ± {error:.4f}")
    return wrong


def print_table(found: dict[str, dict[str, Any]], results: Sequence[Result]) -> None:
    table = Table(
        "way", "max violation, batches", "max violation, validation", "steps to 0.5", "dead", "val", "val - bias"
    )
    for name, row in found.items():
        batches, text, val, difference = (
            f"{row[key][0]:.{digits}f} ± {row[key][1]:.{digits}f}"
            for key, digits in (("max_violation", 2), ("max_violation_val", 2), ("val", 4), ("val_minus_bias", 4))
        )
        steps = " ".join("never" if step is None else str(step) for step in row["steps_to_limit"])
        table.add_row(name, batches, text, steps, str(row["dead"]), val, difference)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    print(f"means over {len({r.seed for r in results})} seeds ± standard error")


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Max violation over steps, a curve per way: the mean over seeds of running means over 10 steps."""
    figure = new_figure(8, 4.5, title)
    ax = figure.add_subplot()
    for way, colour in zip(dict.fromkeys(r.way for r in results), COLOURS, strict=False):
        mean = [statistics.fmean(step) for step in zip(*(r.violation for r in results if r.way == way), strict=True)]
        smooth = [statistics.fmean(mean[max(0, i - 9) : i + 1]) for i in range(len(mean))]
        ax.plot(range(1, len(mean) + 1), smooth, color=colour, label=way)
    ax.axhline(LIMIT, color=GREY, linewidth=0.8, linestyle="--")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("step", fontsize=9, color=GREY)
    ax.set_ylabel("max load / mean load - 1, worst layer", fontsize=9, color=GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=GREY)
    ax.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--width", type=int, default=128, help="(128)")
    add("--depth", type=int, default=3, help="the first third of the blocks is dense (3)")
    add("--experts", type=int, default=16, help="(16)")
    add("--experts-per-token", type=int, default=2, help="(2)")
    add("--bias-rate", type=float, default=0.01, help="(0.01: 300 steps are few; DeepSeek-V3 has 0.001)")
    add("--alphas", type=float, nargs="+", default=[0.001, 0.01], help="of the auxiliary loss (0.001 0.01)")
    add("--optimizer", default="adamw", help="a name of conf/optimizer (adamw)")
    add("--lr", type=float, help="at the ladder's base width (the optimizer file's)")
    add("--steps", type=int, default=300, help="(300)")
    add("--batch", type=int, default=16, help="rows of text per step (16)")
    add("--seq-len", type=int, default=128, help="tokens per row (128)")
    add("--seeds", type=int, default=3, help="of weights and batches (3)")
    add("--device", default="cuda" if cuda else "cpu")
    add("--precision", choices=["bf16", "fp32"], default="bf16" if cuda else "fp32", help="autocast, or not")
    add("--out", type=Path, default=FOLDER, help="folder of the files (benchmarks/balance)")
    add("--name", default="balance", help="of the files (balance)")
    add("--check", action="store_true", help="exit with 1 when the bias does not keep to its limits")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    ways = [Way("bias", bias_rate=args.bias_rate), *(Way(f"loss {alpha:g}", alpha=alpha) for alpha in args.alphas)]
    ways.append(Way("neither"))
    rows_NT = source_rows(args.seq_len).to(args.device)
    results = []
    for seed in range(args.seeds):
        for way in ways:
            start = time.perf_counter()
            results.append(measure(way, seed, args, rows_NT))
            found = results[-1]
            print(
                f"{way.name} seed {seed}: validation text: max violation {found.violation_val:.2f}, {found.dead} dead, "
                f"loss {found.val:.4f}, {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    found = summary(results, ways)
    print_table(found, results)
    wrong = violations(found)
    path = args.out / f"{args.name}.json"
    settings = {key: value for key, value in vars(args).items() if key not in ("check", "out", "name")}
    record = {**circumstances(args.device), "settings": settings, "text": digest(source_rows(args.seq_len))}
    write_json(path, record | {"violations": wrong, "summary": found, "runs": [asdict(r) for r in results]})
    title = f"{args.experts} experts, {args.experts_per_token} chosen: {args.steps} steps, {args.seeds} seeds"
    draw(results, title, path.with_suffix(".png"))
    print(f"written to {path} and .png")
    for line in wrong:
        print(f"VIOLATED: {line}")
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    run(main)
