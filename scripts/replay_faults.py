"""Faults of weight push and engine, replayed in a real RL run on vLLM: how many are caught?

    python scripts/replay_faults.py            # all, in float32 and bfloat16
    python scripts/replay_faults.py --flat     # 100 rounds at lr 0: does the mismatch stay flat?

First rounds without any fault, in which nothing may be raised; then one fault a round, each of which must be caught
before the round's training step. Writes benchmarks/faults/*.json. Exit code 1 unless all were caught.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faults.loop import Run, play, start
from faults.replays import AT_GENERATION, AT_PUSH, HONEST_RACE, WITH_ADAPTERS, Fault, Outcome
from rich.console import Console
from rich.table import Table
from scaling.record import circumstances, run, write_json

from lit_reason.rollout.vllm import check_installed

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "faults"
T_98 = 1.984  # two-sided 95% of Student's t at 98 degrees of freedom
PROCESS = ("engine killed", "engine stopped", "killed, policy moved on", "out of memory", "out of memory, killed")


def replay_all(dtype: str, clean: int, restarts: bool) -> tuple[list[Outcome], dict[str, float]]:
    """One run in `dtype`: `clean` rounds without a fault, then one round for each."""
    outcomes: list[Outcome] = []
    late = [fault for fault in AT_GENERATION if restarts or fault.name not in PROCESS]
    plan: dict[int, Fault] = dict(enumerate([*AT_PUSH, HONEST_RACE, *late], start=clean))
    at_push = dict(list(plan.items())[: len(AT_PUSH)])
    later = {version: fault for version, fault in plan.items() if version not in at_push}

    def act(run: Run, faults: Mapping[int, Fault]) -> None:
        if (fault := faults.get(run.version)) is not None:
            outcomes.append(fault.replay(run, dtype))
            say(outcomes[-1])

    data, model, proven, engine = start(dtype)
    try:
        whole = play(
            data, model, proven, engine, clean + len(plan), lambda run: act(run, at_push), lambda run: act(run, later)
        )
        play(data, model, proven, engine, 3, lambda run: act(run, {2: WITH_ADAPTERS}), lora=True)
    finally:
        engine.close()
    return outcomes, {
        "clean_pushes": float(len(whole.gaps) + 3),
        "gap_mean": statistics.fmean(whole.gaps),
        "gap_max": max(whole.gaps),
        "kl_max": max(whole.kl),
    }


def say(outcome: Outcome) -> None:
    state = "caught" if outcome.caught else "MISSED"
    print(f"{outcome.dtype} step {outcome.step:2d} {state} {outcome.fault}: {outcome.error[:160]}", flush=True)


def flat(rounds: int) -> dict[str, Any]:
    """`mismatch/kl` over rounds at learning rate 0, and its slope (per round) with a 95% interval."""
    data, model, proven, engine = start("float32")
    try:
        kl = np.array(play(data, model, proven, engine, rounds, lr=0.0).kl)
    finally:
        engine.close()
    x = np.arange(len(kl)) - (len(kl) - 1) / 2
    slope = float((x * kl).sum() / (x * x).sum())
    residual = kl - kl.mean() - slope * x
    error = float(np.sqrt((residual**2).sum() / (len(kl) - 2) / (x * x).sum()))
    return {
        "rounds": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "slope": slope,
        "slope_interval": [slope - T_98 * error, slope + T_98 * error],
        "kl": kl.tolist(),
    }


def table(outcomes: Sequence[Outcome]) -> Table:
    shown = Table("fault", "injected", "dtype", "step", "caught", "by", "s")
    for one in outcomes:
        caught = "[green]yes" if one.caught else "[red]NO"
        shown.add_row(one.fault, one.injected, one.dtype, str(one.step), caught, one.by, f"{one.seconds:.1f}")
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--clean", type=int, default=20, help="rounds without a fault before those with one (20)")
    parser.add_argument("--flat", action="store_true", help="the run at learning rate 0 instead")
    parser.add_argument("--rounds", type=int, default=100, help="of --flat (100)")
    args = parser.parse_args(argv)
    began, vllm = time.perf_counter(), check_installed()
    logging.getLogger("lit_reason.rollout.hosted").setLevel(logging.ERROR)  # restarts are part of the plan
    where = circumstances("cpu")
    where["versions"]["vllm"] = vllm
    if args.flat:
        record = flat(args.rounds)
        write_json(FOLDER / "lr0.json", {**where, "seconds": time.perf_counter() - began, **record})
        low, high = record["slope_interval"]
        print(
            f"mismatch/kl {record['kl_mean']:.3g} nats per token, slope {record['slope']:.2g} [{low:.2g}, {high:.2g}]"
        )
        return 0 if low <= 0 <= high else 1
    outcomes: list[Outcome] = []
    measured: dict[str, dict[str, float]] = {}
    for dtype in args.dtypes:
        # A process that dies knows no dtype: its faults, each a new start of vLLM, are replayed once.
        found, measured[dtype] = replay_all(dtype, args.clean, restarts=dtype == args.dtypes[0])
        outcomes += found
    Console().print(table(outcomes))
    caught = sum(one.caught for one in outcomes)
    pushes = sum(int(one["clean_pushes"]) for one in measured.values())
    record = {
        **where,
        "seconds": time.perf_counter() - began,
        "caught": caught,
        "total": len(outcomes),
        "false_alarms": 0,  # one would have ended the run
        "measured": measured,
        "replays": [one.to_dict() for one in outcomes],
    }
    write_json(FOLDER / "replays.json", record)
    print(f"caught {caught} / {len(outcomes)}; 0 false alarms in {pushes} pushes without a fault")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(run(main))
