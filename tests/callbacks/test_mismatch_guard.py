"""Engine and trainer drift apart in a real run: warned of, stopped before the step, or corrected."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_reason.callbacks import MismatchGuard
from lit_reason.errors import ConfigError, RolloutError


class Drifting(L.LightningModule):
    """Logs a mismatch of 0.02, 0.2, 0.3 nats; one weight that every step moves."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.log("mismatch/kl", (0.02, 0.2, 0.3)[batch_idx])
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(module, guard, tmp_path):
    trainer = L.Trainer(
        max_epochs=1, callbacks=[guard], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(3, 1)))


def test_it_warns_once(tmp_path):
    with pytest.warns(UserWarning, match=r"mismatch/kl is 0.2 nats per token at step 1, above warn=0.05") as seen:
        fit(module := Drifting(), MismatchGuard(), tmp_path)
    assert float(module.weight) == -3
    assert sum("mismatch/kl" in str(w.message) for w in seen) == 1


def test_it_stops_before_the_step(tmp_path):
    module = Drifting()
    with pytest.raises(RolloutError, match=r"0.2 nats per token at step 1, above stop=0.1.*Nothing of this step"):
        fit(module, MismatchGuard(warn=None, stop=0.1), tmp_path)
    assert float(module.weight) == -1


def test_nan_stops(tmp_path):
    guard = MismatchGuard(stop=0.1)
    trainer = type("T", (), {"callback_metrics": {"mismatch/kl": torch.tensor(float("nan"))}, "global_step": 4})
    with pytest.raises(RolloutError, match="is nan nats"):
        guard.on_before_optimizer_step(trainer, None, None)


def test_wrong_values():
    with pytest.raises(ConfigError, match=r"stop=0: nats per token, above 0. Type callbacks.mismatch_guard.stop=0.1"):
        MismatchGuard(stop=0)
