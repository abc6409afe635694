"""A layer's experts on a CPU, forward and backward: the loop over them, a product per expert without autograd in
between, torch's grouped products, and the batched product over padded blocks of `lit_reason.models.moe.Experts`.

    python scripts/bench_experts.py               # writes benchmarks/experts/DATE-PROCESSOR.json

Forms alternate within a repeat, so that a machine that slows down slows all. E experts, N tokens, K chosen by each, D
width, F expert width. Loads are uneven and every repeat's are its own, as in training: a product of a new shape costs
a CPU's library up to 5 ms before it begins. `--same` keeps one repeat's choices for all.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_rl_step import free_path, machine, spread
from lit_kernels import one_by_one
from lit_kernels.grouped import experts_reference, grouped_mm
from lit_kernels.permute import permute, unpermute
from torch import Tensor

from lit_reason.models.moe import Experts, Routing

ROOT = Path(__file__).resolve().parent.parent
Form = Callable[..., Tensor]


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


FORMS: dict[str, Form] = {
    "loop": experts_reference,
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


def measure(sizes: tuple[int, ...], dtype: torch.dtype, repeats: int, same: bool) -> dict[str, Any]:
    leaves, grad = problem(sizes, dtype)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for repeat in range(repeats + 2):  # of which the first two are dropped
        chosen = choices(sizes, 0 if same else repeat)
        for name, form in FORMS.items():
            seconds = timed(form, leaves, chosen, grad)
            if repeat > 1:
                runs[name].append(seconds)
    ratios = {
        name: spread([sum(loop) / sum(run) for loop, run in zip(runs["loop"], found, strict=True)])
        for name, found in runs.items()
    }
    return {
        name: {
            "forward_s": spread([run[0] for run in found]),
            "backward_s": spread([run[1] for run in found]),
            "both_s": spread([sum(run) for run in found]),
            "times_the_loop": ratios[name],
            "runs": found,
        }
        for name, found in runs.items()
    }


def _cell(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['min']:.0f} / {1e3 * seconds['median']:.0f}".rjust(16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="(7)")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--experts", type=int, default=32, help="(32)")
    parser.add_argument("--tokens", type=int, default=4096, help="(4096)")
    parser.add_argument("--chosen", type=int, default=4, help="(4)")
    parser.add_argument("--sizes", nargs="+", default=["512x256", "1024x512"], help="D x F (512x256 1024x512)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--same", action="store_true", help="the same choices in every repeat")
    parser.add_argument("--name", help="the JSON's name (date and processor)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    print(f"{'D x F':10} {'form':14} {'forward':>16} {'backward':>16} {'both, ms':>16} {'x loop':>7}   (min / median)")
    for size in args.sizes:
        sizes = (args.experts, args.tokens, args.chosen, *(int(part) for part in size.split("x")))
        found[size] = measure(sizes, getattr(torch, args.dtype), args.repeats, args.same)
        for name, one in found[size].items():
            times = (one[key] for key in ("forward_s", "backward_s", "both_s"))
            cells = " ".join(_cell(t) for t in times)
            print(f"{size:10} {name:14} {cells} {one['times_the_loop']['median']:7.2f}", flush=True)
    record = {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "machine": machine(), "settings": vars(args)}
    cpu = re.sub(r"\W+", "-", record["machine"]["cpu"].replace("(R)", "")).strip("-").lower()
    folder = ROOT / "benchmarks" / "experts"
    folder.mkdir(exist_ok=True)
    path = free_path(args.name or f"{time.strftime('%Y%m%d')}-{cpu}", folder)
    path.write_text(json.dumps({**record, "found": found}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
