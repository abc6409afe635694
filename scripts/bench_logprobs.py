"""The head's part of one policy step, forward and backward: whole logits as trainers take them, and tile by tile.

    python scripts/bench_logprobs.py --check             # 8 x 1024 tokens, a vocabulary of 128,000: 20 GB, 8 minutes
    python scripts/bench_logprobs.py --tokens 256        # where memory is short
    python scripts/bench_logprobs.py --rivals bfloat16   # without the rival that needs the most memory

States are bfloat16, the head's weight float32 under bfloat16 autocast. Every run is a process of its own, one thread,
the sides in turn. Memory is the peak resident set above what was resident before the step (the weight's gradient
counts, for all). Time is the processor's, page faults included, so that other work on the machine does not decide; the
wall clock's is written down too. Prints the ratios and writes `benchmarks/logprobs/<name>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scaling.record import circumstances, run, write_json
from torch import Tensor, nn

from lit_reason.errors import ConfigError
from lit_reason.modules.logprobs import head_logprobs

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "logprobs"
MEMORY_LIMIT, TIME_LIMIT = 0.25, 1.3
WARM_UP = 512  # tokens
BYTES = {"float32": 14, "bfloat16": 8, "ours": 0}  # a logit's, at the peak: rounded up, for the check before the run


def ours(head: nn.Linear, states_MD: Tensor, target_M: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return head_logprobs(head, states_MD, target_M, 1.0)[0]


def float32(head: nn.Linear, states_MD: Tensor, target_M: Tensor) -> Tensor:
    """What most trainers do: the whole logits in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_MV = head(states_MD)
    return torch.log_softmax(logits_MV.float(), -1).gather(-1, target_M[:, None]).squeeze(-1)


def bfloat16(head: nn.Linear, states_MD: Tensor, target_M: Tensor) -> Tensor:
    """Half the memory, and three digits of a log-prob."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_MV = head(states_MD)
    return torch.log_softmax(logits_MV, -1).gather(-1, target_M[:, None]).squeeze(-1)


SIDES: dict[str, Callable[[nn.Linear, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "float32": float32,
    "bfloat16": bfloat16,
}


def resident_mib(key: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(side: str, tokens: int, vocabulary: int, width: int, seed: int) -> dict[str, float]:
    """One step in this process: seconds, MiB above the start, and what shows that all sides did the same work."""
    draw = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.normal_(0, 2 * width**-0.5, generator=draw)
    states_MD = torch.randn(tokens, width, generator=draw).bfloat16().requires_grad_()
    target_M = torch.randint(0, vocabulary, (tokens,), generator=draw)
    advantage_M = torch.randn(tokens, generator=draw)

    def step(rows: int) -> float:
        loss = -(advantage_M[:rows] * SIDES[side](head, states_MD[:rows], target_M[:rows])).mean()
        loss.backward()
        return loss.item()

    step(min(WARM_UP, tokens))
    head.weight.grad = states_MD.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, wall, processor = resident_mib("VmRSS"), time.perf_counter(), time.process_time()
    loss = step(tokens)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resident_mib("VmHWM") - before
    assert head.weight.grad is not None and states_MD.grad is not None
    gradients = {"weight_grad": head.weight.grad.norm().item(), "states_grad": states_MD.grad.norm().item()}
    return {"processor_s": processor, "wall_s": wall, "peak_mib": peak, "loss": loss, **gradients}


def check_fits(side: str, args: argparse.Namespace) -> None:
    """Raises ConfigError when the machine has not enough free memory for this side."""
    free = next(int(s.split()[1]) << 10 for s in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in s)
    logits, fixed = BYTES[side] * args.batch * args.tokens * args.vocabulary, 20 * args.vocabulary * args.width
    if logits + fixed > free:
        raise ConfigError(
            f"{side} needs about {(logits + fixed) / 1e9:.0f} GB, free are {free / 1e9:.1f}: type --tokens "
            f"{max(int(args.tokens * (free - fixed) / max(logits, 1) * 0.9), 1)}, or --rivals bfloat16"
        )


def in_process(side: str, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    tokens = args.batch * args.tokens
    shape = {"tokens": tokens, "vocabulary": args.vocabulary, "width": args.width, "seed": args.seed}
    command = [sys.executable, __file__, "--side", json.dumps({"side": side, **shape})]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Ours over each rival: medians of time and memory, and the least times."""

    def over(rival: str, key: str, value: Callable[[list[float]], float]) -> float:
        mine, theirs = (value([r[key] for r in runs[side]]) for side in ("ours", rival))
        return mine / theirs

    return {
        rival: {
            "time": over(rival, "processor_s", statistics.median),
            "time_of_least": over(rival, "processor_s", min),
            "wall": over(rival, "wall_s", statistics.median),
            "memory": over(rival, "peak_mib", statistics.median),
        }
        for rival in runs
        if rival != "ours"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="(8)")
    parser.add_argument("--tokens", type=int, default=1024, help="per row (1024)")
    parser.add_argument("--vocabulary", type=int, default=128_000, help="(128000)")
    parser.add_argument("--width", type=int, default=1024, help="(1024)")
    parser.add_argument("--rivals", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="processes per side (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="logprobs", help="of the file (logprobs)")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 unless memory <= 1/4 and time <= 1.3 of each rival"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(1)
        print(json.dumps(measure(**json.loads(args.side))))
        return 0

    runs: dict[str, list[dict[str, float]]] = {side: [] for side in ("ours", *args.rivals)}
    for side in runs:
        check_fits(side, args)
    for repeat in range(args.repeats):
        for side, found in runs.items():
            found.append(in_process(side, args))
            new = found[-1]
            print(
                f"run {repeat + 1} {side:9} {new['processor_s']:6.1f} s (wall {new['wall_s']:.1f}), "
                f"{new['peak_mib']:,.0f} MiB, loss {new['loss']:.5f}, gradients {new['weight_grad']:.4g} of the weight "
                f"and {new['states_grad']:.4g} of the states",
                flush=True,
            )
    record = {key: value for key, value in vars(args).items() if key not in ("side", "check", "name")}
    sides = {
        side: {key: spread([r[key] for r in found]) for key in ("processor_s", "wall_s", "peak_mib")}
        for side, found in runs.items()
    }
    found = ratios(runs)
    path = FOLDER / f"{args.name}.json"
    write_json(path, {**circumstances("cpu"), "settings": record, "sides": sides, "ratios": found, "runs": runs})
    passed = True
    for rival, ratio in found.items():
        good = ratio["memory"] <= MEMORY_LIMIT and ratio["time"] <= TIME_LIMIT
        passed &= good
        print(
            f"ours over {rival}: memory {ratio['memory']:.3f} (at most {MEMORY_LIMIT}), time {ratio['time']:.2f}, "
            f"of the least {ratio['time_of_least']:.2f} (at most {TIME_LIMIT}): {'passed' if good else 'FAILED'}"
        )
    print(f"written to {path}")
    return int(args.check and not passed)


if __name__ == "__main__":
    run(main)
