"""Holds vLLM against our model and transformers: the same greedy tokens, and the log-probs after every weight push.

    python scripts/vllm_parity.py            # on vLLM's CPU build or a GPU; exit code 1 when a limit is exceeded

    greedy   64 prompts of the shelf's model, as it is and with a muP multiplier that an export must fold in, float32:
             BuiltinEngine, transformers' `generate` on the exported folder, and vLLM must make the same tokens
    push     after each of several weight pushes: mean |log p vLLM - log p ours| of sampled tokens, at most 1e-4 nats in
             float32 and 0.02 in bfloat16

Writes benchmarks/vllm/parity.json."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_rl_step import machine
from transformers import AutoModelForCausalLM

from lit_reason import zoo
from lit_reason.data import PromptData, ReasoningGym
from lit_reason.models import Transformer
from lit_reason.models.hf import save_hf
from lit_reason.modules.logprobs import chosen_logprobs
from lit_reason.rollout import BuiltinEngine, Sampling, VLLMEngine
from lit_reason.rollout.vllm import check_installed
from lit_reason.types import Completion, Prompt

RECORD = Path(__file__).resolve().parents[1] / "benchmarks" / "vllm" / "parity.json"
LIMITS = {"float32": 1e-4, "bfloat16": 0.02}
TOKENS = 48


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="arith-1m.sft", help="a zoo name (arith-1m.sft)")
    parser.add_argument("--pushes", type=int, default=5)
    args = parser.parse_args()
    loaded = zoo.load(args.model)
    model = loaded.model.float().eval()
    data = PromptData(ReasoningGym({"chain_sum": {"max_terms": 3, "max_digits": 2}}, size=1000), loaded.tokenizer)
    prompts = data.train_prompts()[:64]
    record: dict[str, Any] = {"machine": machine(), "model": args.model, "vllm": check_installed()}
    for name, one in {"greedy": model, "greedy, multiplier 0.75": rebased(model)}.items():
        found = record[name] = greedy(one, loaded.tokenizer, prompts)
        print(f"{name}: {found['same']} of {found['prompts']} prompts with the same tokens on all three")
    for dtype, limit in LIMITS.items():
        gaps = after_pushes(model, loaded.tokenizer, prompts, dtype, args.pushes)
        record[dtype] = {"limit": limit, "mean_gap": gaps}
        print(f"{dtype}: mean gap after {len(gaps)} pushes, at most {max(gaps):.2g} nats (limit {limit:g})")
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    differ = any(one["same"] < one["prompts"] for key, one in record.items() if key.startswith("greedy"))
    return int(differ or any(max(record[dtype]["mean_gap"]) > limit for dtype, limit in LIMITS.items()))


def rebased(model: Transformer) -> Transformer:
    """The same weights with muP's residual multiplier at 3/4, which an export must fold in, and not exactly."""
    config = replace(model.config, base=replace(model.config.base, depth=model.config.depth * 3 // 4))
    other = Transformer(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def greedy(model: Transformer, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, int]:
    """How many prompts have the same greedy completion in all three."""
    sampling, seeds = Sampling(temperature=0.0, max_tokens=TOKENS), [0] * len(prompts)
    found = []
    for engine in (BuiltinEngine(tokenizer, "float32"), VLLMEngine(tokenizer, "float32")):
        engine.push(model, 0)
        found.append([completion.token_ids for completion in engine.generate(prompts, sampling, seeds)])
        getattr(engine, "close", lambda: None)()
    with tempfile.TemporaryDirectory() as folder:
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            save_hf(model, Path(folder) / "model"), attn_implementation="eager", experts_implementation="eager"
        )
        found.append([transformers_greedy(theirs, prompt.token_ids, tokenizer.stop_ids) for prompt in prompts])
    return {"prompts": len(prompts), "same": sum(len(set(row)) == 1 for row in zip(*found, strict=True))}


def transformers_greedy(model: Any, ids: Sequence[int], stop_ids: Sequence[int]) -> tuple[int, ...]:
    out = model.generate(
        torch.tensor([list(ids)]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=0
    )
    return tuple(out[0, len(ids) :].tolist())


def after_pushes(model: Transformer, tokenizer: Any, prompts: Sequence[Prompt], dtype: str, pushes: int) -> list[float]:
    """Mean |log p vLLM - log p ours| of sampled tokens after each push; before each, every weight moves a little."""
    engine, gaps = VLLMEngine(tokenizer, dtype), []
    for version in range(pushes):
        engine.push(model, version)
        gaps.append(
            mean_gap(model, prompts, engine.generate(prompts, Sampling(max_tokens=TOKENS), range(len(prompts))))
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3 * parameter.std(correction=0) * torch.randn_like(parameter)
    engine.close()
    return gaps


@torch.no_grad()
def mean_gap(model: Transformer, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> float:
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        start = len(prompt.token_ids)
        ours, _ = chosen_logprobs(model(ids)[0, start - 1 : -1], ids[0, start:], 1.0)
        gaps.append((ours - torch.tensor(completion.logprobs)).abs())
    return float(torch.cat(gaps).mean())


if __name__ == "__main__":
    sys.exit(main())
