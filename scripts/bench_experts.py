"""A layer's experts on a CPU, forward and backward: loops over them, a product per expert without autograd in between,
torch's grouped products, and the batched product over padded blocks of `lit_reason.models.moe.Experts`.

    python scripts/bench_experts.py               # writes benchmarks/experts/DATE-PROCESSOR.json

E experts, N tokens, K chosen by each, D width, F expert width. Loads are uneven and those of every repeat its own, as
in training: a bfloat16 product of a new shape costs a CPU's library some milliseconds before it begins. `--known` runs
each repeat's choices once before they are timed, and so leaves that out. Every form has a process of its own, as what
one has compiled would serve another; processes take turns.

The first loop takes a matrix of the stack as transformers does, `stack[e]`, for whose gradient autograd fills a stack
of zeros per expert; the second takes the stack apart once.
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
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_rl_step import dated_path, machine, spread
from lit_kernels import one_by_one
from lit_kernels.grouped import experts_reference, grouped_mm
from lit_kernels.permute import permute, unpermute
from torch import Tensor

import lit_reason
from lit_reason.cli.stages import commit
from lit_reason.models.moe import Experts, Routing

ROOT = Path(__file__).resolve().parent.parent
Form = Callable[..., Tensor]


def unbound(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`experts_reference`, with the stacks taken apart once."""
    out = torch.zeros_like(x)
    for e, (to_hidden, to_out) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        token, k = torch.where(chosen == e)
        gate, up = F.linear(x[token], to_hidden).chunk(2, dim=-1)
        out = out.index_add(0, token, F.linear(F.silu(gate) * up, to_out) * weights[token, k, None])
    return out


def grouped(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`lit_kernels.grouped.experts` as a GPU runs it."""
    rows, ends, place = permute(x, chosen, len(down), "torch")
    gate, up = grouped_mm(rows, gate_up, ends).chunk(2, dim=-1)
    return unpermute(grouped_mm(F.silu(gate) * up, down, ends), place, weights, "torch")


def padded(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    with torch.device("meta"):
        module = Experts(len(down), down.shape[1], down.shape[2])
    return torch.func.functional_call(
        module, {"gate_up": gate_up, "down": down}, (x, Routing(chosen, weights, weights))
    )


LOOPS = ("loop", "loop, unbound")
FORMS: dict[str, Form] = {
    "loop": experts_reference,
    "loop, unbound": unbound,
    "one by one": one_by_one.experts,  # type: ignore[assignment]
    "F.grouped_mm": grouped,
    "padded bmm": padded,
}


def problem(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Of E, N, K, D, F: leaves (x, weights, gate_up, down) and the output's gradient."""
    torch.manual_seed(0)
    E, N, K, D, width = sizes
    shapes = ((N, D), (N, K), (E, 2 * width, D), (E, D, width))
    leaves = [(torch.randn(shape) / 8).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn(N, D).to(dtype)


def choices(sizes: tuple[int, ...], seed: int) -> Tensor:
    """(N, K), of experts that are liked to different degrees."""
    generator = torch.Generator().manual_seed(seed)
    E, N, K = sizes[:3]
    scores_NE = torch.randn((N, E), generator=generator) + torch.randn(E, generator=generator) / 2
    return scores_NE.topk(K).indices


def timed(form: Form, leaves: list[Tensor], chosen: Tensor, grad: Tensor) -> tuple[float, float]:
    """Seconds forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    x, weights, gate_up, down = leaves
    start = time.perf_counter()
    out = form(x, chosen, weights, gate_up, down)
    middle = time.perf_counter()
    out.backward(grad)
    return middle - start, time.perf_counter() - middle


def one_process(form: str, sizes: tuple[int, ...], args: argparse.Namespace, first: int) -> list[tuple[float, float]]:
    """Seconds of each repeat, the choices' seeds counted from `first`; two repeats before them are dropped."""
    torch.set_num_threads(args.threads)
    leaves, grad = problem(sizes, getattr(torch, args.dtype))
    runs = []
    for seed in range(first, first + args.repeats + 2):
        chosen = choices(sizes, seed)
        if args.known:
            timed(FORMS[form], leaves, chosen, grad)
        runs.append(timed(FORMS[form], leaves, chosen, grad))
    return runs[2:]


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Of every form: all seconds, their spreads, and how many times the loops' speed, process by process."""
    runs: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in FORMS}
    for turn in range(args.processes):
        for name in FORMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--form", name, "--sizes", size, "--turn", str(turn)]
            env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            if done.returncode:
                raise SystemExit(f"{name} at {size} failed:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: [statistics.median(map(sum, run)) for run in found] for name, found in runs.items()}
    return {
        name: {
            **{
                key: spread([pick(seconds) for run in found for seconds in run])
                for key, pick in (("forward_s", itemgetter(0)), ("backward_s", itemgetter(1)), ("both_s", sum))
            },
            **{
                f"times_the_{loop}": spread([a / b for a, b in zip(medians[loop], medians[name], strict=True)])
                for loop in LOOPS
            },
            "runs": found,
        }
        for name, found in runs.items()
    }


def _cell(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['min']:.0f} / {1e3 * seconds['median']:.0f}".rjust(16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3, help="of each form (3)")
    parser.add_argument("--repeats", type=int, default=5, help="in each (5)")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--experts", type=int, default=32, help="(32)")
    parser.add_argument("--tokens", type=int, default=4096, help="(4096)")
    parser.add_argument("--chosen", type=int, default=4, help="(4)")
    parser.add_argument("--sizes", nargs="+", default=["512x256", "1024x512"], help="D x F (512x256 1024x512)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--known", action="store_true", help="every product was compiled before it is timed")
    parser.add_argument("--name", help="the JSON's name (date and processor)")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = {size: (args.experts, args.tokens, args.chosen, *map(int, size.split("x"))) for size in args.sizes}
    if args.form:
        first = 1000 * args.turn
        print(json.dumps(one_process(args.form, shapes[args.sizes[0]], args, first)))
        return
    found = {}
    heads = " ".join(f"{head:>16}" for head in ("forward", "backward", "both, ms"))
    print(f"{'D x F':10} {'form':14} {heads}  x loop x unbound   (min / median)")
    for size in args.sizes:
        found[size] = measure(size, args)
        for name, one in found[size].items():
            cells = " ".join(_cell(one[key]) for key in ("forward_s", "backward_s", "both_s"))
            ratios = [one[f"times_the_{loop}"]["median"] for loop in LOOPS]
            print(f"{size:10} {name:14} {cells} {ratios[0]:7.2f} {ratios[1]:9.2f}", flush=True)
    some = next(iter(shapes.values()))  # choices do not depend on widths
    loads = [choices(some, seed).flatten().bincount() for seed in range(args.repeats)]
    settings = {key: value for key, value in vars(args).items() if key not in ("form", "turn", "name")}
    record = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit(),
        "versions": {"torch": torch.__version__, "lit_reason": lit_reason.__version__},
        "machine": machine(),
        "settings": settings,
        "largest_over_mean_load": spread([float(load.max() / load.float().mean()) for load in loads]),
        "found": found,
    }
    path = dated_path(args.name, ROOT / "benchmarks" / "experts")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
