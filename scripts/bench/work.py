"""The work that both sides of `bench_rl_step.py` do, and the record that each side hands back.

Needs the standard library only: one copy of this file runs under lit_reason's Python and under TRL's.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One GRPO step: generate `prompts * group` completions of exactly `completion` tokens, one optimizer step.

    The defaults are a 1.0M-parameter DeepSeek-V3: 4 layers (the first dense), 8 experts, 2 chosen, 1 shared.
    The stop token is the id `vocab`, one past what the model can emit, so that no completion ends early
    and neither side pays for a logits processor that would forbid it.
    """

    hidden: int = 128
    layers: int = 4
    dense_layers: int = 1
    heads: int = 4
    kv_lora: int = 32
    q_lora: int = 0
    nope: int = 16
    rope: int = 16
    v_dim: int = 32
    dense_ffn: int = 256
    expert_ffn: int = 64
    experts: int = 8
    chosen: int = 2
    shared: int = 1
    vocab: int = 272
    prompts: int = 16
    group: int = 16
    prompt: int = 24
    completion: int = 48
    steps: int = 6
    warmup: int = 2
    threads: int = 2
    seed: int = 0

    @property
    def sequences(self) -> int:
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        """Completion tokens of one step."""
        return self.sequences * self.completion

    @property
    def context(self) -> int:
        return self.prompt + self.completion

    def prompt_ids(self) -> list[list[int]]:
        """Distinct random prompts, enough for every step: `steps * prompts` lists of `prompt` token ids."""
        rng = random.Random(self.seed)
        return [[rng.randrange(self.vocab) for _ in range(self.prompt)] for _ in range(self.steps * self.prompts)]


def trivial_reward(token_ids: list[int]) -> float:
    """Fraction of even token ids: costs nothing and differs within a group, so that every advantage counts."""
    return sum(token % 2 == 0 for token in token_ids) / max(len(token_ids), 1)


@dataclass
class Clock:
    """Wall-clock seconds per step, and the part of each that was generation."""

    step_seconds: list[float] = field(default_factory=list)
    generate_seconds: list[float] = field(default_factory=list)

    def check(self, work: Work) -> None:
        if not len(self.step_seconds) == len(self.generate_seconds) == work.steps:
            raise RuntimeError(
                f"expected {work.steps} steps, one generation each; "
                f"got {len(self.step_seconds)} steps and {len(self.generate_seconds)} generations"
            )


def peak_rss_mib() -> float:
    """Highest resident set of this process so far, MiB (Linux counts `ru_maxrss` in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summarise(work: Work, clock: Clock, rss_before_mib: float) -> dict[str, Any]:
    """Median step after warm-up, in seconds and in completion tokens per second."""
    clock.check(work)
    steps, generates = clock.step_seconds[work.warmup :], clock.generate_seconds[work.warmup :]
    step, generate = statistics.median(steps), statistics.median(generates)
    return {
        "tokens_per_s": work.tokens / step,
        "step_s": step,
        "generate_s": generate,
        "train_s": statistics.median(s - g for s, g in zip(steps, generates, strict=True)),
        "generate_tokens_per_s": work.tokens / generate,
        "peak_rss_mib": peak_rss_mib(),
        "rss_after_imports_mib": rss_before_mib,
        "step_seconds": clock.step_seconds,
        "generate_seconds": clock.generate_seconds,
    }


def read_job() -> tuple[Work, dict[str, Any], Path]:
    """The side's command line: one JSON file that names the work, the side's own settings and where to write."""
    job = json.loads(Path(sys.argv[1]).read_text())
    return Work(**job["work"]), job["settings"], Path(job["result"])


def write_job(path: Path, work: Work, settings: dict[str, Any], result: Path) -> None:
    path.write_text(json.dumps({"work": asdict(work), "settings": settings, "result": str(result)}))
