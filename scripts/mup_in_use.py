"""One recipe at several widths, and at the narrow one several learning rates, side by side.

    for lr in 0.002 0.004 0.008; do
        lit-reason-train experiment=arith_22m model=arith_1m model.width=64 pretrain.optimizer.lr=$lr run_name=w64-$lr
    done
    lit-reason-train experiment=arith_22m model=arith_1m run_name=w128
    lit-reason-train experiment=arith_22m run_name=w512
    python scripts/mup_in_use.py runs/w64-* runs/w128 runs/w512

Reads finished runs; prints, and writes to `benchmarks/mup/in_use.json`: width, parameters, the rate, the mean loss over
the last eighth of pretraining (nats per token), and the primed model's pass@1 on held-out problems with its 95%
interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from scaling.record import FOLDER, write_json

from lit_reason import zoo

TAIL = 0.125  # share of the steps whose mean training loss counts


def read(run: Path) -> dict[str, Any]:
    """One row."""
    config: Any = OmegaConf.load(run / "pretrain" / "config.yaml")
    lines = (run / "pretrain" / "metrics" / "steps.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    primed = zoo.info(run / "sft" / "model")
    metric = primed["metrics"]["pass_at_1"]
    return {
        "width": config.model.width,
        "parameters": primed["params"],
        "lr": config.optimizer.lr,
        "steps": len(losses),
        "rows": config.text.batch_size,
        "seq_len": config.text.seq_len,
        "seed": config.seed,
        "commit": primed["commit"],
        "loss": statistics.fmean(losses[-max(1, int(TAIL * len(losses))) :]),
        "pass_at_1": metric["value"],
        "interval": metric["ci"],
        "problems": metric["n"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--name", default="in_use", help="of the file (in_use)")
    args = parser.parse_args()
    for path in args.runs:
        if not (path / "sft" / "model").is_dir():
            parser.error(f"{path} holds no finished run of pretraining and priming (no folder sft/model)")
    rows = sorted(map(read, args.runs), key=lambda row: (row["width"], row["lr"]))
    for key in ("steps", "rows", "seq_len", "seed", "problems"):
        if len(found := {row[key] for row in rows}) > 1:
            raise SystemExit(f"the runs differ in {key} ({', '.join(map(str, sorted(found)))}) and cannot be compared")
    table = Table("width", "parameters", "lr at width 64", "loss", "pass@1", "95% interval")
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            str(row["width"]), f"{row['parameters']:,}", f"{row['lr']:g}", f"{row['loss']:.4f}",
            f"{row['pass_at_1']:.1%}", f"{low:.1%} .. {high:.1%}",
        )  # fmt: skip
    Console().print(table)
    write_json(FOLDER / f"{args.name}.json", {"date": time.strftime("%Y-%m-%d"), "rows": rows})
    print(f"written to {FOLDER / args.name}.json")


if __name__ == "__main__":
    main()
