"""A tiny dropout model, a loader with an integer cursor, and child processes to kill."""

import multiprocessing
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_reason.checkpoint import RNGState, SafeCheckpointIO


class Net(LightningModule):
    """Dropout makes every weight depend on torch's generator."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}]


class Cursor:
    """`length` batches an epoch, each a function of its number alone."""

    def __init__(self, length=7):
        self.length, self.served, self.position = length, 0, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        while self.position < self.length:
            self.position += 1
            self.served += 1
            yield torch.randn(3, 4, generator=torch.Generator().manual_seed(self.served))
        self.position = 0

    def state_dict(self):
        return {"served": self.served, "position": self.position}

    def load_state_dict(self, state):
        self.served, self.position = state["served"], state["position"]


def make_trainer(root, steps, callbacks=(), rng=True, **kwargs):
    return Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        plugins=[SafeCheckpointIO()],
        callbacks=[*callbacks, *([RNGState()] if rng else [])], **kwargs,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    """Lightning's advice about workers, loggers and existing folders is not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def shm(tmp_path):
    """A folder on another file system than the temporary one (tmpfs where there is one)."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def child():
    """`child(f, *args)` runs f in a forked process and returns the started process."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(function, *args):
        process = context.Process(target=function, args=args, daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def tiny():
    """`tiny(root, steps, callbacks, ckpt_path=...)` trains the tiny model and returns it."""

    def run(root, steps, callbacks=(), ckpt_path=None, rng=True, seed=0, net=None, **kwargs):
        torch.manual_seed(seed)
        model = net or Net()
        torch.manual_seed(seed + 1)
        make_trainer(root, steps, callbacks, rng, **kwargs).fit(model, Cursor(), ckpt_path=ckpt_path)
        return model

    run.Net, run.Cursor = Net, Cursor
    return run
