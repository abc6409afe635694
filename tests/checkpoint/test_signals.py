"""A run told to stop leaves a checkpoint of its last finished step, and continues from it bit for bit."""

import os
import signal
import time

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_reason.checkpoint import SafeCheckpointIO, SaveOnSignal, find_resume


def stopping_net(tiny, number, at, times=1):
    """A network that sends itself a signal in the middle of micro-batch `at` (from 0)."""
    net = tiny.Net()
    step, seen = net.training_step, []

    def training_step(batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == at + 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(batch, batch_idx)

    net.training_step = training_step
    return net


# (micro-batch of the signal, accumulation, optimizer step it must be saved at); 7 micro-batches an epoch.
@pytest.mark.parametrize(
    ("number", "at", "accumulate", "saved"),
    [
        (signal.SIGTERM, 4, 1, 5),
        (signal.SIGINT, 4, 1, 5),
        (signal.SIGTERM, 0, 1, 1),
        (signal.SIGTERM, 6, 1, 7),
        (signal.SIGTERM, 2, 2, 2),
        (signal.SIGTERM, 3, 2, 2),
        (signal.SIGTERM, 6, 2, 4),
    ],
)
def test_stop_saves_the_finished_step_and_resumes_exactly(tmp_path, tiny, capfd, number, at, accumulate, saved):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    whole = tiny(tmp_path / "whole", 10, accumulate_grad_batches=accumulate)
    torch.manual_seed(0)
    net = stopping_net(tiny, number, at)
    callbacks = [SaveOnSignal(), ModelCheckpoint(tmp_path / "checkpoints", save_top_k=0)]
    with pytest.raises(SystemExit) as stopped:
        tiny(tmp_path, 10, callbacks, net=net, accumulate_grad_batches=accumulate)
    assert stopped.value.code == 128 + number
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    path = find_resume(tmp_path)
    assert path == tmp_path / "checkpoints" / "interrupted.ckpt"
    assert SafeCheckpointIO().load_checkpoint(path)["global_step"] == saved
    assert f"after step {saved}, saved {path}" in capfd.readouterr().err
    resumed = tiny(tmp_path, 10, [SaveOnSignal()], ckpt_path=path, seed=99, accumulate_grad_batches=accumulate)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_a_second_ctrl_c_stops_at_once_without_a_checkpoint(tmp_path, tiny, capfd):
    net = stopping_net(tiny, signal.SIGINT, 4, times=2)
    with pytest.raises(SystemExit) as stopped:
        tiny(tmp_path, 10, [SaveOnSignal(tmp_path)], net=net)
    assert stopped.value.code == 1
    assert find_resume(tmp_path) is None
    assert "stopped at once, nothing was saved" in capfd.readouterr().err


class InterruptsTheSave(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the handler runs at once and ends this


def test_a_ctrl_c_in_the_middle_of_the_last_save_leaves_no_half_checkpoint(tmp_path, tiny, capfd):
    net = stopping_net(tiny, signal.SIGINT, 4)
    with pytest.raises(SystemExit) as stopped:
        tiny(tmp_path, 10, [SaveOnSignal(tmp_path), InterruptsTheSave()], net=net)
    assert stopped.value.code == 130
    assert not list(tmp_path.rglob("*ckpt*"))
    assert "stopped at once, nothing was saved" in capfd.readouterr().err


def test_sigterm_twice_still_saves(tmp_path, tiny):
    """Schedulers send it to the whole process group, and again to each process."""
    net = stopping_net(tiny, signal.SIGTERM, 4, times=2)
    with pytest.raises(SystemExit) as stopped:
        tiny(tmp_path, 10, [SaveOnSignal(tmp_path)], net=net)
    assert stopped.value.code == 143
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "interrupted.ckpt")["global_step"] == 5


def test_an_error_saves_nothing(tmp_path, tiny):
    """After a NaN or a bug in the middle of a step the state is not one to continue from."""
    net = tiny.Net()
    step = net.training_step
    net.training_step = lambda batch, batch_idx: step(batch, batch_idx) if batch_idx < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        tiny(tmp_path, 10, [SaveOnSignal(tmp_path)], net=net)
    assert find_resume(tmp_path) is None
