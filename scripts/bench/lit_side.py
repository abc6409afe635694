"""GRPO steps in lit_reason, timed: the shipped engine, loop, objective and module in a Lightning Trainer.

Started by `bench_rl_step.py`. Settings: `micro_batch`, sequences per backward pass; accumulation makes every step one
optimizer step on all sequences. `experts`, how they are trained: "batched" (the model's own way), "grouped"
(`GroupedGEMM`) or "loop" (one product after the other in Python). Weights are float32, training is bf16 by autocast,
generation runs on a bf16 copy.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lit_kernels.grouped import experts_reference
from lit_kernels.swap import Swap
from work import Clock, Work, peak_rss_mib, read_job, summarise, trivial_reward

import lit_reason

# The rival imports its trainer at the top as well: both sides' "after imports" figure holds every library.
from lit_reason.callbacks import GroupedGEMM
from lit_reason.callbacks.swapping import Change, swapped
from lit_reason.data import ByteTokenizer, PromptCursor
from lit_reason.loop import RolloutLoop, RoundShape, Stages
from lit_reason.models import ModelConfig, Transformer
from lit_reason.models.moe import Experts, Routing
from lit_reason.modules import PolicyModule
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.rewards import ItemReward, Rubric
from lit_reason.rollout import BuiltinEngine, Sampling, request_seed
from lit_reason.types import Completion, Prompt


class Trivial(ItemReward):
    """The reward of both sides."""

    def score(self, prompt: Prompt, completion: Completion) -> float:
        return trivial_reward(list(completion.token_ids))


class BenchTokenizer(ByteTokenizer):
    """Bytes; its stop token is one past what the model can emit, as the rival's is."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab_size, self.stop_ids = vocab, (vocab,)

    def decode(self, ids: Any) -> str:
        return super().decode([i for i in ids if i < ByteTokenizer.vocab_size])


def build_model(work: Work) -> Transformer:
    torch.manual_seed(work.seed)
    return Transformer(
        ModelConfig(
            vocab_size=work.vocab,
            width=work.hidden,
            depth=work.layers,
            heads=work.heads,
            q_lora_rank=work.q_lora or None,
            kv_lora_rank=work.kv_lora,
            qk_nope_head_dim=work.nope,
            qk_rope_head_dim=work.rope,
            v_head_dim=work.v_dim,
            ffn_width=work.dense_ffn,
            first_dense=work.dense_layers,
            experts=work.experts,
            experts_per_token=work.chosen,
            expert_width=work.expert_ffn,
            shared_experts=work.shared,
            max_seq_len=work.context,
        )
    )


def objective() -> Objective:
    """GRPO as TRL's defaults have it: group-normalised advantages, one mean over the step's tokens, no KL term."""
    return Objective(
        advantage={"name": "group_norm", "eps": 1e-4, "ddof": 1},
        ratio="token",
        clip={"name": "ppo", "low": 0.2, "high": 0.2, "dual": None},
        aggregation="token_mean",
    )


class StepClock(L.Callback):
    """Seconds from the end of one optimizer step to the end of the next: everything is in it, data included."""

    def __init__(self, clock: Clock, micro_batches: int) -> None:
        self.clock, self.micro_batches, self.last = clock, micro_batches, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if self.clock.generate_seconds and (kwargs.get("batch_idx", args[-1]) + 1) % self.micro_batches == 0:
            now = time.perf_counter()
            self.clock.step_seconds.append(now - self.last)
            self.last = now


def rollout_loop(work: Work, settings: dict[str, Any], policy: PolicyModule, clock: Clock) -> RolloutLoop:
    engine = BuiltinEngine(BenchTokenizer(work.vocab))
    sampling = Sampling(max_tokens=work.completion)
    rubric = Rubric({"trivial": Trivial()})

    def push(version: int) -> None:
        start = time.perf_counter()
        engine.push(policy.model, version)
        clock.generate_seconds.append(time.perf_counter() - start)  # the copy is a cost of generating

    def generate(prompts: Any, seeds: Any, samples: Any) -> list[Completion]:
        start = time.perf_counter()
        completions = engine.generate(prompts, sampling, seeds, samples)
        clock.generate_seconds[-1] += time.perf_counter() - start
        if tokens := sum(len(c.token_ids) for c in completions) - work.tokens:
            raise RuntimeError(f"generated {tokens:+d} tokens more than the work has")
        return completions

    prompts = [Prompt(f"{i:016x}", "", "", "bench", tuple(ids)) for i, ids in enumerate(work.prompt_ids())]
    return RolloutLoop(
        PromptCursor(prompts, shuffle=False),
        Stages(push, generate, rubric.score, policy.objective.assess),
        RoundShape(
            rounds=work.steps,
            prompts_per_round=work.prompts,
            group_size=work.group,
            micro_batches=work.sequences // settings["micro_batch"],
        ),
        request_seed=request_seed,
        seed=work.seed,
        max_completion=work.completion,
        on_round=policy.on_round,
    )


class Loop(GroupedGEMM):
    """Experts one after the other."""

    def changes(self, model: torch.nn.Module) -> Iterator[Change]:
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                yield swapped(name, module, "a loop", OneByOne)


class OneByOne(Swap):
    def forward(self, x_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        weights = (self.gate_up.bfloat16(), self.down.bfloat16())  # type: ignore[attr-defined]
        return experts_reference(x_ND.bfloat16(), routing.experts_NK, routing.weights_NK, *weights)


EXPERTS: dict[str, list[L.Callback]] = {"batched": [], "grouped": [GroupedGEMM()], "loop": [Loop()]}


def main() -> None:
    work, settings, result = read_job()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(work.threads)
    rss_before = peak_rss_mib()
    clock = Clock()
    policy = PolicyModule(build_model(work), AdamW(lr=1e-6), objective())
    loop = rollout_loop(work, settings, policy, clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed",
            accumulate_grad_batches=loop.shape.micro_batches,
            num_sanity_val_steps=0,
            inference_mode=False,
            log_every_n_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[StepClock(clock, loop.shape.micro_batches), *EXPERTS[settings["experts"]]],
        )
        trainer.fit(policy, loop)
    record = summarise(work, clock, rss_before) | {
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "versions": {"lit_reason": lit_reason.__version__, "lightning": L.__version__},
    }
    record["versions"]["torch"] = torch.__version__
    result.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
