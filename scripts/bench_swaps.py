"""The stranger's project of examples/transformers_moe.py, as it is and with our callbacks: loss, step time, memory.

    python scripts/bench_swaps.py                 # writes benchmarks/swaps/DATE-PROCESSOR.json

Every side is a process of its own; sides alternate. Memory is how far the largest resident set rose in training above
its largest before. `eager` is transformers' loop over experts, `grouped_mm` its own grouped products.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench_rl_step import dated_path, machine, spread

from lit_reason.cli.stages import commit

ROOT = Path(__file__).resolve().parent.parent
OURS = "both callbacks"
SIDES = {
    "transformers, eager": ("eager", ()),
    "transformers, grouped_mm": ("grouped_mm", ()),
    "GroupedGEMM": ("eager", ("GroupedGEMM",)),
    OURS: ("eager", ("GroupedGEMM", "FusedLogProb")),
}


def one_side(experts: str, swaps: list[str], steps: int, precision: str) -> dict[str, Any]:
    """Trains in this process. Losses of all steps; median seconds of a step after the first two."""
    import lightning as L
    import torch
    from transformers import Qwen3MoeConfig

    sys.path.insert(0, str(ROOT / "examples"))
    from transformers_moe import EXPERTS, SIZES, Project  # type: ignore[import-not-found]

    from lit_reason import callbacks

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.ends.append(time.perf_counter())
            self.losses.append(float(trainer.callback_metrics["loss"]))

    L.seed_everything(1, verbose=False)
    project, clock = Project(Qwen3MoeConfig(**SIZES, **EXPERTS), experts), Clock()
    data = torch.utils.data.DataLoader(torch.randint(SIZES["vocab_size"], (8 * steps, 512)), batch_size=8)  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    L.Trainer(
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        accelerator="cpu",
        callbacks=[clock, *(getattr(callbacks, name)() for name in swaps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    ).fit(project, data)
    seconds = [b - a for a, b in zip(clock.ends[1:], clock.ends[2:], strict=False)]
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"losses": clock.losses, "step_s": statistics.median(seconds), "memory_mib": peak}


def measure(side: str, steps: int, precision: str) -> dict[str, Any]:
    experts, swaps = SIDES[side]
    command = [sys.executable, __file__, "--side", experts, *swaps, "--steps", str(steps)]
    env = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run([*command, "--precision", precision], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes per side (3)")
    parser.add_argument("--steps", type=int, default=6, help="(6)")
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--name", help="the JSON's name (date and processor)")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.side[0], args.side[1:], args.steps, args.precision)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES:
            runs[side].append(found := measure(side, args.steps, args.precision))
            print(f"run {repeat + 1}, {side}: {found['step_s']:.2f} s, {found['memory_mib']:.0f} MiB", flush=True)
    summary: dict[str, Any] = {
        side: {key: spread([run[key] for run in found]) for key in ("step_s", "memory_mib")}
        for side, found in runs.items()
    }
    for side in SIDES:
        if side == OURS:
            continue
        pairs = list(zip(runs[OURS], runs[side], strict=True))
        summary[f"against {side}"] = {
            "speed": spread([theirs["step_s"] / mine["step_s"] for mine, theirs in pairs]),
            "memory": spread([mine["memory_mib"] / theirs["memory_mib"] for mine, theirs in pairs]),
            "largest_loss_difference": max(
                abs(a - b) / b for mine, theirs in pairs for a, b in zip(mine["losses"], theirs["losses"], strict=True)
            ),
        }
    print(json.dumps(summary, indent=1))
    record = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "lightning")},
        "machine": machine(),
        "settings": {key: value for key, value in vars(args).items() if key not in ("side", "name")},
    }
    path = dated_path(args.name, ROOT / "benchmarks" / "swaps")
    path.write_text(json.dumps({**record, "summary": summary, "runs": runs}, indent=1) + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
