"""Time one GRPO step here and in TRL's GRPOTrainer: the same work, one run, each side in processes of its own.

    python scripts/bench_rl_step.py                      # 3 runs a side, alternating
    python scripts/bench_rl_step.py --sweep              # first look for each side's best settings (10 minutes)
    python scripts/bench_rl_step.py --only lit           # this side alone; no TRL environment needed
    python scripts/bench_rl_step.py --only experts       # ours with three ways of computing experts
    python scripts/bench_rl_step.py --hidden 256 --completion 128

Prints tokens/s, the generate/train split and peak memory of both and the ratios, and writes
`benchmarks/rl_step/<name>.json`. TRL lives in `.venv-trl`, made on the first run from `requirements/trl.txt`.
What is compared, and how, is written in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.work import Work, write_job

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "scripts" / "bench"

RUN_LIMIT_S = 900.0
SWEEP_TRIALS = 2  # the faster of two counts: one trial that another process disturbed must not decide


@dataclass(frozen=True)
class Side:
    """One contestant: the script that runs it, the best settings known, and what `--sweep` tries."""

    name: str
    script: str
    best: dict[str, Any]
    axes: dict[str, list[Any]]


LIT = Side(
    "lit_reason",
    "lit_side.py",
    {"micro_batch": 128, "experts": "batched"},
    {"micro_batch": [128, 32, 64, 256], "experts": ["batched", "grouped"]},
)
# How the experts would be computed otherwise: a product each in a Python loop, as transformers' eager form does, and
# grouped products.
LIT_LOOP = Side("lit_loop", LIT.script, LIT.best | {"experts": "loop"}, {})
LIT_GROUPED = Side("lit_grouped", LIT.script, LIT.best | {"experts": "grouped"}, {})
TRL = Side(
    "trl",
    "trl_side.py",
    {
        "precision": "bf16",
        "experts": "grouped_mm",
        "attention": "eager",
        "micro_batch": 256,
        "checkpointing": False,
    },
    {
        "precision": ["bf16", "bf16-mixed"],
        "experts": ["grouped_mm", "eager"],
        "attention": ["eager", "sdpa"],
        "micro_batch": [256, 64, 128],
        "checkpointing": [False, True],
    },
)

# The rival with our numerics: float32 weights, autocast. Bfloat16 weights are faster and lose small updates.
TRL_MIXED = Side(
    "trl_mixed",
    TRL.script,
    TRL.best | {"precision": "bf16-mixed"},
    {axis: values for axis, values in TRL.axes.items() if axis != "precision"},
)

# What TRL does when it is told nothing but the work: 8 sequences per backward pass, gradient checkpointing.
TRL_DEFAULTS = Side(
    "trl_defaults",
    TRL.script,
    {
        "precision": "bf16-mixed",
        "experts": "grouped_mm",
        "attention": "sdpa",
        "micro_batch": 8,
        "checkpointing": True,
    },
    {},
)
SIDES = (LIT, TRL, TRL_MIXED, TRL_DEFAULTS)
OURS = (LIT, LIT_LOOP, LIT_GROUPED)
RATIOS = {
    TRL.name: "ratio_",
    TRL_MIXED.name: "ratio_to_mixed_",
    TRL_DEFAULTS.name: "ratio_to_defaults_",
    LIT_LOOP.name: "ratio_to_loop_",
    LIT_GROUPED.name: "ratio_to_grouped_",
}


def trl_python(environment: Path) -> Path:
    """The rival's interpreter; makes its environment when it is missing or its pins have changed."""
    python, stamp = environment / "bin" / "python", environment / ".installed"
    pins = (ROOT / "requirements" / "trl.txt").read_text()
    if not (stamp.is_file() and stamp.read_text() == pins):
        print(f"setting up {environment} (a few minutes, once)", flush=True)
        torch_version = next(line.split("==")[1] for line in pins.splitlines() if line.startswith("torch=="))
        install_torch = ROOT / "requirements" / "install_torch.sh"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run(["bash", install_torch, python, torch_version], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", ROOT / "requirements" / "trl.txt"], check=True)
        stamp.write_text(pins)
    return python


def run_side(python: Path, side: Side, work: Work, settings: dict[str, Any]) -> dict[str, Any]:
    """One process of one side; returns its measurements."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        write_job(job, work, settings, result)
        env = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [python, BENCH / side.script, job]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=RUN_LIMIT_S)
        if done.returncode:
            raise SystemExit(f"{side.name} with {settings} failed:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def sweep(python: Path, side: Side, work: Work) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Best settings by one axis at a time, each from the best so far; and every trial."""
    best, trials = dict(side.best), []

    def speed(settings: dict[str, Any]) -> float:
        known = next((t for t in trials if t["settings"] == settings), None)
        if known is None:
            measured = max(
                (run_side(python, side, work, settings) for _ in range(SWEEP_TRIALS)), key=lambda r: r["tokens_per_s"]
            )
            known = {"settings": settings, **{k: measured[k] for k in ("tokens_per_s", "peak_rss_mib")}}
            trials.append(known)
            print(f"  {side.name} {settings}: {known['tokens_per_s']:,.0f} tokens/s", flush=True)
        return known["tokens_per_s"]

    for axis, values in side.axes.items():
        best = max(({**best, axis: value} for value in values), key=speed)
    return best, trials


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """min / median / max of each measurement over a side's runs, and of the ratios of neighbouring runs."""
    keys = ("tokens_per_s", "step_s", "generate_s", "train_s", "generate_tokens_per_s", "peak_rss_mib")
    out: dict[str, Any] = {side: {k: spread([r[k] for r in rs]) for k in keys} for side, rs in runs.items()}
    for rival, prefix in RATIOS.items():
        if LIT.name in runs and rival in runs:
            pairs = list(zip(runs[LIT.name], runs[rival], strict=True))
            for key in ("tokens_per_s", "generate_tokens_per_s", "peak_rss_mib"):
                out[prefix + key] = spread([ours[key] / theirs[key] for ours, theirs in pairs])
            out[prefix + "train_speed"] = spread([theirs["train_s"] / ours["train_s"] for ours, theirs in pairs])
    return out


def machine() -> dict[str, Any]:
    cpu = platform.processor() or "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    flags = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in Path("/proc/cpuinfo").read_text()]
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": flags,
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def print_table(record: dict[str, Any]) -> None:
    rows = [
        ("tokens_per_s", "completion tokens/s", 0),
        ("step_s", "step, s", 3),
        ("generate_s", "  generate, s", 3),
        ("train_s", "  everything else, s", 3),
        ("peak_rss_mib", "peak memory, MiB", 0),
    ]
    sides = [side.name for side in (*SIDES, *OURS[1:]) if side.name in record["summary"]]
    print(f"\n{'median (min .. max)':22}" + "".join(f"{name:>30}" for name in sides))
    for key, label, digits in rows:
        cells = (record["summary"][name][key] for name in sides)
        text = (f"{c['median']:,.{digits}f} ({c['min']:,.{digits}f} .. {c['max']:,.{digits}f})" for c in cells)
        print(f"{label:22}" + "".join(f"{cell:>30}" for cell in text))
    for rival, prefix in RATIOS.items():
        for key, label in (("tokens_per_s", "tokens/s"), ("peak_rss_mib", "memory")):
            if r := record["summary"].get(prefix + key):
                print(f"{label}, ours over {rival}'s: {r['median']:.2f} ({r['min']:.2f} .. {r['max']:.2f})")


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Work]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes per side (3)")
    parser.add_argument("--sweep", action="store_true", help="find each side's best settings first")
    parser.add_argument("--only", choices=["lit", "trl", "experts"], help="one side alone, or ours by ways of experts")
    parser.add_argument("--name", help="the JSON's name (date and processor)")
    parser.add_argument("--trl-env", type=Path, default=ROOT / ".venv-trl", help="TRL's environment (.venv-trl)")
    for f in fields(Work):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=int, default=f.default, help=f"({f.default})")
    args = parser.parse_args(argv)
    work = Work(**{f.name: getattr(args, f.name) for f in fields(Work)})
    if not 0 <= work.warmup < work.steps:
        parser.error(f"--warmup {work.warmup}: must be below --steps {work.steps}")
    return args, work


def main() -> int:
    args, work = parse()
    sides = [side for side in SIDES if args.only in (None, "lit" if side is LIT else "trl")] or list(OURS)
    pythons = {s.name: Path(sys.executable) if s in OURS else trl_python(args.trl_env) for s in sides}
    settings, trials = {s.name: s.best for s in sides}, {}
    if args.sweep:
        for side in sides:
            settings[side.name], trials[side.name] = sweep(pythons[side.name], side, work)

    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "machine": machine(), "work": asdict(work)}
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for repeat in range(args.repeats):
        for side in sides:
            measured = run_side(pythons[side.name], side, work, settings[side.name])
            runs[side.name].append(measured)
            print(f"run {repeat + 1} {side.name}: {measured['tokens_per_s']:,.0f} tokens/s", flush=True)
    record |= {"settings": settings, "summary": summary(runs), "runs": runs, "sweep": trials}
    print_table(record)

    cpu = "-".join(record["machine"]["cpu"].replace("(R)", "").split()[:3]).lower()
    path = free_path(args.name or f"{time.strftime('%Y%m%d')}-{cpu}")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")
    return 0


def dated_path(name: str | None, folder: Path) -> Path:
    """A free path of that name; without one, of date and processor."""
    cpu = re.sub(r"\W+", "-", machine()["cpu"].replace("(R)", "")).strip("-").lower()
    return free_path(name or f"{time.strftime('%Y%m%d')}-{cpu}", folder)


def free_path(name: str, folder: Path = ROOT / "benchmarks" / "rl_step") -> Path:
    """`name.json`, or `name-2.json` and so on: an earlier measurement stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / f"{name}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


if __name__ == "__main__":
    sys.exit(main())
