"""Somebody else's Lightning project, a mixture of experts of transformers, gets two callbacks of lit_reason.

python examples/transformers_moe.py            # with them
python examples/transformers_moe.py --plain    # without: the same loss, more time and memory
"""

import argparse

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lit_reason.callbacks import FusedLogProb, GroupedGEMM


class Project(L.LightningModule):
    def __init__(self, config: Qwen3MoeConfig, experts: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(config, experts_implementation=experts).train()

    def training_step(self, ids: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


SIZES = {"vocab_size": 32000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 64}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "num_key_value_heads": 4}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--experts", default="eager", help="transformers' own: eager, grouped_mm or batched_mm")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    L.seed_everything(1)
    data = DataLoader(torch.randint(SIZES["vocab_size"], (8 * args.steps, 512)), batch_size=8)
    callbacks = [] if args.plain else [GroupedGEMM(), FusedLogProb()]
    quiet = {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=1, precision="bf16-mixed", accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(Project(Qwen3MoeConfig(**SIZES, **EXPERTS), args.experts), data)
    print("loss", trainer.callback_metrics["loss"].item())
