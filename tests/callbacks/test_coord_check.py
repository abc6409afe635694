"""MuPCoordCheck in a real Trainer: the right numbers, and no trace of it in the training."""

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_reason.callbacks import MuPCoordCheck
from lit_reason.callbacks.coord_check import probe_rows
from lit_reason.data.loader import CursorLoader, text_batch
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.models.coord import CoordinateProbe
from lit_reason.modules import PretrainModule
from lit_reason.optim import AdamW

SHAPE = {
    "vocab_size": 40, "width": 32, "depth": 2, "heads": 2, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "ffn_width": 48, "experts": 4, "expert_width": 16, "max_seq_len": 48,
    "base": Base(width=32, depth=2),
}  # fmt: skip


def pretrain(tmp_path, callbacks, steps=4, **trainer_arguments):
    """(trainer, module) after training our model on random rows."""
    L.seed_everything(3)
    rows_NT = torch.randint(0, 40, (64, 13))
    module = PretrainModule(Transformer(ModelConfig(**SHAPE)), AdamW(lr=2**-6))
    loader = CursorLoader(64, lambda items: text_batch(rows_NT, items), batch_size=4)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_steps=steps, callbacks=callbacks, accelerator="cpu", log_every_n_steps=1,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        **{"logger": False} | trainer_arguments,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer, module


class Keep(L.Callback):
    """The embedding at the start and after every optimizer step, and the first batch's ids."""

    def __init__(self):
        self.embedding, self.ids = [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.ids is None:
            self.ids = batch.input_ids_BT.clone()
            self.embedding.append(pl_module.model.embed.weight.detach().clone())

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.embedding.append(pl_module.model.embed.weight.detach().clone())


def test_weights_are_the_same_with_and_without_it(tmp_path):
    """Also the routers' counters and biases, which a forward pass in train mode would move."""
    _, plain = pretrain(tmp_path, [])
    _, measured = pretrain(tmp_path, [MuPCoordCheck(steps=3)])
    states = plain.state_dict(), measured.state_dict()
    assert any(name.endswith("bias_E") and value.any() for name, value in states[0].items())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_embedding_moved_by_what_is_logged(tmp_path):
    """The change of the embedding's output on the first batch, from the weights themselves."""
    keep, check = Keep(), MuPCoordCheck(steps=2)
    pretrain(tmp_path, [check, keep])
    start = keep.embedding[0][keep.ids]
    for step in (1, 2):
        expected = (keep.embedding[step][keep.ids] - start).square().mean().sqrt().item()
        assert check.measured[step]["coord/update/embedding"] == pytest.approx(expected, rel=1e-5)
        assert check.measured[step]["coord/change/embedding"] == pytest.approx(expected, rel=1e-5)
    assert {"coord/change/attn_logits", "coord/update/W_UK", "coord/update/router"} <= set(check.measured[1])


def test_it_stops_after_its_steps_and_frees_its_copies(tmp_path):
    check = MuPCoordCheck(steps=2)
    logger = CSVLogger(tmp_path)
    _, module = pretrain(tmp_path, [check], steps=4, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["coord/update/head"]]
    assert logged == [0, 1]
    assert check._probe is None and check._forward is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_a_run_that_ends_early_leaves_no_hooks(tmp_path):
    check = MuPCoordCheck(steps=100)
    _, module = pretrain(tmp_path, [check], steps=1)
    assert check._probe is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


class Net(L.LightningModule):
    """A stranger's module with dropout, called as `self(x)`, as `self.model(x)`, or in pieces."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        if call == "model":
            self.model = net
        else:
            self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        calls = {"forward": lambda x: self(x), "model": lambda x: self.model(x), "pieces": lambda x: self.net(x)}
        return calls[self.call](batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("call", "accumulate"), [("forward", 1), ("model", 3)])
def test_a_strangers_module_is_measured_by_role(fit, call, accumulate, monkeypatch):
    """A forward pass with dropout would move the random state of training. One measurement per optimizer step."""
    measure, calls = CoordinateProbe.measure, []
    monkeypatch.setattr(CoordinateProbe, "measure", lambda probe: calls.append(1) or measure(probe))
    check = MuPCoordCheck(per_module=True)
    _, measured = fit([check], module=_seeded(call), accumulate_grad_batches=accumulate)
    _, plain = fit([], module=_seeded(call), accumulate_grad_batches=accumulate)
    assert all(torch.equal(a, b) for a, b in zip(measured.parameters(), plain.parameters(), strict=True))
    assert list(check.measured) == [1, 2, 3, 4] and len(calls) == 4
    assert check.measured[4]["coord/update/matrix"] > 0
    assert check.measured[1]["coord/change/matrix/0" if call == "model" else "coord/change/matrix/net.0"] > 0


def test_it_says_when_it_cannot_see_the_model(fit):
    with pytest.warns(UserWarning, match=r"logs nothing: let training_step call"):
        fit([check := MuPCoordCheck()], module=_seeded("pieces"))
    assert check.measured == {}


def _seeded(call):
    torch.manual_seed(0)
    return Net(call)


def test_the_probe_is_whole_rows_of_bounded_size():
    ids_BT = torch.arange(60).view(6, 10)
    assert torch.equal(probe_rows(ids_BT, 10, 25), ids_BT[:2])
    assert torch.equal(probe_rows(ids_BT, 4, 8), ids_BT[:2, :4])
    assert torch.equal(probe_rows(torch.arange(30), 10, 25), torch.arange(10)[None])  # packed
    assert probe_rows(ids_BT, 10, 3).shape == (1, 10)
