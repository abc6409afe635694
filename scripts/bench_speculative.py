"""Greedy decoding with and without drafts from the model's multi-token-prediction module, on the same prompts.

    lit-reason-train experiment=arith_from_scratch stages=[pretrain,sft] model.mtp_depth=1 run_name=mtp
    python scripts/bench_speculative.py dir:runs/mtp/sft/model

For every batch size: tokens per second of both, runs alternating, the median's ratio; the share of drafts that were
right; and how many completions are the same (all, but for ties within rounding). Writes
`benchmarks/speculative/<name>.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scaling.record import circumstances, run, write_json

from lit_reason import zoo
from lit_reason.data import PromptData, ReasoningGym
from lit_reason.rollout import BuiltinEngine, Sampling
from lit_reason.types import Completion, Prompt

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "speculative"
TASKS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}}


def timed(
    engine: BuiltinEngine, prompts: Sequence[Prompt], batch: int, max_tokens: int
) -> tuple[float, list[Completion]]:
    """(tokens per second, completions) of `prompts`, `batch` at a time."""
    sampling, found = Sampling(temperature=0.0, max_tokens=max_tokens), []
    start = time.perf_counter()
    for i in range(0, len(prompts), batch):
        rows = prompts[i : i + batch]
        found += engine.generate(rows, sampling, seeds=range(len(rows)))
    return sum(len(c.token_ids) for c in found) / (time.perf_counter() - start), found


def compare(loaded: Any, prompts: Sequence[Prompt], batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    engines = [BuiltinEngine(loaded.tokenizer, args.dtype, speculative=drafts) for drafts in (False, True)]
    for engine in engines:
        engine.push(loaded.model, version=0)
        timed(engine, prompts[:batch], batch, args.max_tokens)  # first shapes are slow
    rates: list[list[float]] = [[], []]
    found: list[list[Completion]] = [[], []]
    for _ in range(args.repeats):
        for i, engine in enumerate(engines):
            rate, found[i] = timed(engine, prompts, batch, args.max_tokens)
            rates[i].append(rate)
    plain, drafts = map(statistics.median, rates)
    return {
        "batch": batch,
        "prompts": len(prompts),
        "plain": rates[0],
        "drafts": rates[1],
        "ratio": drafts / plain,
        "ratios": [b / a for a, b in zip(*rates, strict=True)],
        "accepted": engines[1].accepted / engines[1].drafted,
        "same": sum(a.token_ids == b.token_ids for a, b in zip(*found, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="zoo name, or dir:PATH, of a model with model.mtp_depth >= 1")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128], help="(1 16 128)")
    parser.add_argument("--max-tokens", type=int, default=48, help="(48)")
    parser.add_argument("--repeats", type=int, default=5, help="(5)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(bfloat16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="speculative", help="of the file (speculative)")
    args = parser.parse_args()
    loaded = zoo.load(args.checkpoint)
    loaded.model.to(args.device)
    source = ReasoningGym(TASKS, size=20_000)
    held_out = PromptData(source, tokenizer=loaded.tokenizer, max_prompt_tokens=96).test_prompts(256)
    rows = []
    for batch in args.batches:
        few = held_out[: max(16, 2 * batch)]
        rows.append(compare(loaded, few, batch, args))
    table = Table("rows at a time", "plain, tokens/s", "drafts, tokens/s", "ratio", "range", "drafts accepted", "same")
    for row in rows:
        plain, drafts = (f"{statistics.median(row[key]):,.0f}" for key in ("plain", "drafts"))
        spread = f"{min(row['ratios']):.2f} - {max(row['ratios']):.2f}"
        same = f"{row['same']}/{row['prompts']}"
        table.add_row(str(row["batch"]), plain, drafts, f"{row['ratio']:.2f}", spread, f"{row['accepted']:.0%}", same)
    Console().print(table)
    settings = vars(args) | {"parameters": sum(p.numel() for p in loaded.model.parameters())}
    settings |= {"checkpoint": Path(args.checkpoint).name, "commit": loaded.info["commit"]}
    path = FOLDER / f"{args.name}.json"
    write_json(path, {**circumstances(args.device), "settings": settings, "rows": rows})
    print(f"written to {path}")


if __name__ == "__main__":
    run(main)
