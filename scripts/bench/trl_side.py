"""GRPO steps in TRL's GRPOTrainer, timed. Runs under the Python of `.venv-trl`; started by `bench_rl_step.py`.

Settings (each can be swept, so that the rival runs at its best):

- `micro_batch`: `per_device_train_batch_size`; accumulation makes every step one optimizer step on all sequences.
- `precision`: `"bf16"` has bf16 weights throughout, `"bf16-mixed"` has fp32 weights and autocast in training
  (TRL then generates in fp32), `"fp32"`.
- `experts`: transformers' `experts_implementation`: `"eager"`, `"batched_mm"` or `"grouped_mm"`.
- `attention`: `"sdpa"` or `"eager"`.
- `checkpointing`: TRL's default is gradient checkpointing; off is faster.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from functools import wraps
from typing import Any

from work import Clock, Work, peak_rss_mib, read_job, summarise, trivial_reward

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Token id i is written `t<i>`; `stop` and `pad` come after what the model can emit."""
    words = {f"t{i}": i for i in range(vocab)} | {"stop": vocab, "pad": vocab + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="stop", pad_token="pad", padding_side="left")


def build_model(work: Work, settings: dict[str, Any]) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=work.vocab,
        hidden_size=work.hidden,
        intermediate_size=work.dense_ffn,
        moe_intermediate_size=work.expert_ffn,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        n_shared_experts=work.shared,
        n_routed_experts=work.experts,
        num_experts_per_tok=work.chosen,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=work.dense_layers,
        kv_lora_rank=work.kv_lora,
        q_lora_rank=work.q_lora or None,
        qk_rope_head_dim=work.rope,
        qk_nope_head_dim=work.nope,
        v_head_dim=work.v_dim,
        max_position_embeddings=work.context,
        num_mtp_layers=0,
        bos_token_id=None,
        eos_token_id=work.vocab,
        pad_token_id=None,
        attn_implementation=settings["attention"],
        experts_implementation=settings["experts"],
    )
    torch.manual_seed(work.seed)
    model = DeepseekV3ForCausalLM(config)
    return model.to(torch.bfloat16) if settings["precision"] == "bf16" else model


def trainer_config(work: Work, settings: dict[str, Any], folder: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=settings["precision"] == "bf16-mixed",
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=work.sequences // settings["micro_batch"],
        gradient_checkpointing=settings["checkpointing"],
        num_generations=work.group,
        max_completion_length=work.completion,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=work.steps,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
    )


def time_generate(model: DeepseekV3ForCausalLM, work: Work, clock: Clock) -> None:
    """Wrap `model.generate` with a stop-watch that also proves the length of what came out."""
    generate = model.generate

    @wraps(generate)
    def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        ids_BT = generate(*args, **kwargs)
        clock.generate_seconds.append(time.perf_counter() - start)
        if ids_BT.shape != (work.sequences, work.context):
            raise RuntimeError(f"generated {tuple(ids_BT.shape)}, the work is {(work.sequences, work.context)}")
        return ids_BT

    model.generate = timed


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: everything is in it, data included."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.last = clock, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.clock.step_seconds.append(now - self.last)
        self.last = now


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [trivial_reward(ids) for ids in completion_ids]


def main() -> None:
    work, settings, result = read_job()
    torch.set_num_threads(work.threads)
    rss_before = peak_rss_mib()
    model, clock = build_model(work, settings), Clock()
    prompts = [" ".join(f"t{i}" for i in ids) for ids in work.prompt_ids()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=trainer_config(work, settings, folder),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=word_tokenizer(work.vocab),
            callbacks=[StepClock(clock)],
        )
        time_generate(model, work, clock)
        trainer.train()
    record = summarise(work, clock, rss_before) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {m.__name__: m.__version__ for m in (trl, transformers, accelerate, torch)},
    }
    result.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
