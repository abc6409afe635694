"""A small RL run on N processes (Lightning starts this file once more for each):

python ranks_run.py N OUT ALGORITHM [RANK_WHOSE_REWARD_FAILS]
"""

import sys
from pathlib import Path

import lightning as L
import torch
import yaml

from lit_reason.data import ByteTokenizer, PromptCursor
from lit_reason.loop import RolloutLoop, RoundShape
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.modules import PolicyModule
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.rollout import BuiltinEngine, Sampling, request_seed
from lit_reason.types import Prompt, Scores

SHAPE = RoundShape(rounds=2, prompts_per_round=4, group_size=4, minibatches=2, micro_batches=2)


def score(prompts, completions):
    """The share of even tokens, and whether the completion is short: they vary within every group."""
    rows = [[sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids), len(c.token_ids) < 10] for c in completions]
    return Scores(
        ("even", "short"), torch.tensor([1.0, 0.5]), torch.tensor(rows), torch.zeros(len(rows), 2, dtype=torch.long)
    )


class Gradients(L.Callback):
    """The norm of every optimizer step's gradient, as Lightning averaged it over the processes."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def main(devices: int, out: Path, algorithm: str, failing: int | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            width=32, depth=2, heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            ffn_width=48, experts=4, expert_width=16, max_seq_len=48, base=Base(width=32, depth=2),
        )
    )  # fmt: skip
    axes = yaml.safe_load((Path(__file__).parents[2] / "conf" / "algorithm" / f"{algorithm}.yaml").read_text())
    axes.pop("_target_")
    policy = PolicyModule(model, AdamW(lr=2**-8), Objective(**axes))
    engine, sampling = BuiltinEngine(ByteTokenizer(), dtype="float32"), Sampling(max_tokens=10)
    prompts = [Prompt(f"{i:016x}", f"q{i}", "", "test", (i + 1, *range(50, 51 + i % 3))) for i in range(7)]

    def judge(prompts, completions):
        if failing is not None and torch.distributed.get_rank() == failing:
            raise OSError("the judge's server is gone")
        return score(prompts, completions)

    stages = policy.stages(engine, sampling, judge, updates=SHAPE.updates, log_kl=True)
    rounds = []
    loop = RolloutLoop(
        PromptCursor(prompts, seed=5), stages, SHAPE, request_seed=request_seed, seed=1, max_completion=10,
        on_round=lambda r: (rounds.append([c.token_ids for g in r.groups for c in g.completions]), policy.on_round(r)),
    )  # fmt: skip
    record = Gradients()
    trainer = L.Trainer(
        default_root_dir=out.parent, max_epochs=1, accumulate_grad_batches=SHAPE.micro_batches, accelerator="cpu",
        devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=[record],
    )  # fmt: skip
    trainer.fit(policy, loop)
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"gradients": record.steps, "rounds": rounds, "metrics": metrics}, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
