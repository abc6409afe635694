"""One tiny LightningModule on which every callback is tried, by a real Trainer."""

import lightning as L
import pytest
import torch
from torch import nn


class Tiny(L.LightningModule):
    """y = w x with a counter of experts; `announce(module, step)` runs at the start of every optimizer step."""

    def __init__(self, announce=None, bad_step=None, bad="loss"):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.moe = nn.Module()
        self.moe.register_buffer("load_E", torch.zeros(4))
        self.announce, self.bad_step, self.bad = announce, bad_step, bad

    def training_step(self, batch, batch_idx):
        if self.announce:
            self.announce(self, self.trainer.global_step)
        self.moe.load_E += torch.tensor([4.0, 2.0, 2.0, 0.0])
        out = self.last(self.first(batch[0])).pow(2).mean()
        if self.trainer.global_step == self.bad_step:
            out = out * float("nan") if self.bad == "loss" else out + (self.first.weight * 0).sqrt().sum()
        self.log("loss", out)
        return out

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.moe.load_E.zero_()

    def configure_optimizers(self):
        groups = [
            {"params": self.first.parameters(), "lr": 0.1, "name": "hidden"},
            {"params": self.last.parameters(), "lr": 0.01, "name": "head"},
        ]
        return torch.optim.SGD(groups, lr=0.5)


@pytest.fixture
def fit(tmp_path):
    """fit(callbacks, steps=4, module=..., batches=None, **trainer arguments) -> (trainer, module)."""

    def run(callbacks, steps=4, module=None, ckpt_path=None, **kwargs):
        L.seed_everything(0)
        module = module or Tiny()
        data = torch.utils.data.TensorDataset(torch.randn(400, 2))
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        defaults = {
            "default_root_dir": tmp_path,
            "max_steps": steps,
            "callbacks": callbacks,
            "accelerator": "cpu",
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": any(isinstance(c, L.pytorch.callbacks.ProgressBar) for c in callbacks),
        }
        trainer = L.Trainer(**{**defaults, **kwargs})
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return trainer, module

    run.Tiny = Tiny
    return run
