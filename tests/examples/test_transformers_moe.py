"""The stranger's project trains to the same loss with the callbacks as without."""

import importlib.util
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import Qwen3MoeConfig

from lit_reason.callbacks import FusedLogProb, GroupedGEMM

PATH = Path(__file__).parents[2] / "examples" / "transformers_moe.py"
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("transformers_moe", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        self.values.append(float(trainer.callback_metrics["loss"]))


@pytest.mark.parametrize(("precision", "within"), [("32-true", 1e-5), ("bf16-mixed", 0.005)])
def test_the_same_losses(example, precision, within, tmp_path):
    def losses(callbacks):
        L.seed_everything(1)
        project, seen = example.Project(Qwen3MoeConfig(**SMALL), "eager"), Losses()
        data = torch.utils.data.DataLoader(torch.randint(4, (40, 24)), batch_size=4)
        L.Trainer(
            max_epochs=1, precision=precision, callbacks=[*callbacks, seen], logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(project, data)  # fmt: skip
        return seen.values

    plain, ours = losses([]), losses([GroupedGEMM(), FusedLogProb()])
    assert len(plain) == 10 and plain[-1] < 0.9 * plain[0]
    for mine, theirs in zip(ours, plain, strict=True):
        assert abs(mine / theirs - 1) < within
