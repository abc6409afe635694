"""One side of `bench_rollout.py`: generates the work in a process of its own and writes what it took.

    python rollout_side.py job.json

Every side samples at temperature 1 from the same folder of weights, knows no stop token, and makes `limits[r]` tokens
for request r. Log-probs are made by the builtin engine only: RL needs them, the rivals are not asked for them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Generate = Callable[[int], int]  # generates the first n requests; how many tokens that were asked for
CLOCK = os.sysconf("SC_CLK_TCK")


def builtin(job: Job) -> tuple[Generate, dict[str, Any]]:
    """The engine as shipped; and how long a push takes."""
    import torch
    from endless import Endless

    from lit_reason.models.hf import load_hf
    from lit_reason.rollout import BuiltinEngine, BuiltinProcess, Replicas, Sampling
    from lit_reason.types import Prompt

    threads, dtype, rows, replicas = (job["settings"][key] for key in ("threads", "dtype", "max_rows", "replicas"))
    torch.set_num_threads(threads)
    model, tokenizer = load_hf(job["folder"], dtype=torch.float32).to(job["device"]), Endless(job["vocab"])
    engine: Any = BuiltinEngine(tokenizer, dtype, rows)
    if replicas > 1:
        engine = Replicas([BuiltinProcess(tokenizer, dtype, threads, {"max_rows": rows}) for _ in range(replicas)])
    pushes = []
    for version in range(30):
        start = time.perf_counter()
        engine.push(model, version)
        pushes.append(time.perf_counter() - start)
    prompts = [Prompt(f"{i:016x}", "", "", "bench", tuple(ids)) for i, ids in enumerate(job["prompts"])]
    sampling = Sampling(max_tokens=max(job["limits"]))

    def generate(n: int) -> int:
        found = engine.generate(prompts[:n], sampling, range(n), limits=job["limits"][:n])
        return sum(len(completion.token_ids) for completion in found)

    pids = [one.process.pid for one in engine.engines] if replicas > 1 else []
    return generate, {"push_s": sorted(pushes)[len(pushes) // 2], "pids": pids}


def transformers(job: Job) -> tuple[Generate, dict[str, Any]]:
    """`generate` batch after batch, left-padded; each runs until its longest row, and only what was asked counts."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    settings = job["settings"]
    torch.set_num_threads(settings["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype=settings["dtype"],
        attn_implementation=settings["attention"],
        experts_implementation=settings["experts"],
    ).eval()

    def batch(prompts: list[list[int]], limits: list[int]) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(limits),
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=settings["cache"],
            disable_compile=True,
        )
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        if out.shape != (len(prompts), longest + max(limits)):
            raise RuntimeError(f"generate gave {tuple(out.shape)}")
        return sum(limits)

    def generate(n: int) -> int:
        size = settings["batch"]
        parts = [slice(start, min(start + size, n)) for start in range(0, n, size)]
        return sum(batch(job["prompts"][part], job["limits"][part]) for part in parts)

    return generate, {}


def vllm(job: Job) -> tuple[Generate, dict[str, Any]]:
    """vLLM in this process; its prefix cache shares prompts, and is emptied before every pass."""
    settings = job["settings"]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_MLA_DISABLE": "1",  # its latent attention runs at the latent sizes of large models only
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHDYNAMO_DISABLE": str(int(settings["eager"])),
        # Left to itself it keeps a core free for a server.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: settings["threads"]])),
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["folder"],
        dtype=settings["dtype"],
        enforce_eager=settings["eager"],
        max_model_len=job["context"],
        max_num_seqs=settings["batch"],
        kv_cache_memory_bytes=2 << 30,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},  # its CPU kernel rotates the first head only
    )

    def generate(n: int) -> int:
        llm.reset_prefix_cache()
        params = [
            SamplingParams(temperature=1.0, max_tokens=limit, ignore_eos=True, detokenize=False)
            for limit in job["limits"][:n]
        ]
        asked: Any = [{"prompt_token_ids": ids} for ids in job["prompts"][:n]]
        out = llm.generate(asked, params, use_tqdm=False)
        return sum(len(request.outputs[0].token_ids) for request in out)

    return generate, {}


SIDES = {"builtin": builtin, "transformers": transformers, "vllm": vllm}


def processor_s(pids: Sequence[int]) -> float:
    """Of this process and of those."""
    total = time.process_time()
    for pid in pids:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / CLOCK
    return total


def main() -> None:
    job: Job = json.loads(Path(sys.argv[1]).read_text())
    generate, record = SIDES[job["side"]](job)
    generate(job["warmup"])
    pids = record.pop("pids", [])
    wall, processor = time.perf_counter(), processor_s(pids)
    tokens = generate(len(job["prompts"]))
    wall, processor = time.perf_counter() - wall, processor_s(pids) - processor
    if tokens != sum(job["limits"]):
        raise RuntimeError(f"{job['side']} made {tokens} tokens, the work has {sum(job['limits'])}")
    record |= {"tokens": tokens, "wall_s": wall, "processor_s": processor}
    record |= {"tokens_per_s": tokens / wall, "tokens_per_processor_s": tokens / processor}
    Path(job["result"]).write_text(json.dumps(record | {"load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
