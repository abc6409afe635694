"""Crash-safe saving: kills, damage, disk full, and what a checkpoint may hold."""

import enum
import functools
import json
import logging
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from lit_reason.checkpoint import SafeCheckpointIO, find_resume
from lit_reason.checkpoint.atomic import HashingWriter, temporary_name
from lit_reason.checkpoint.manifest import manifest_path, verify
from lit_reason.errors import CheckpointError


def state(step, size=20_000):
    return {"global_step": step, "weights": torch.full((size,), float(step))}


def save_forever(folder, names):
    io = SafeCheckpointIO()
    for step in range(1, 10**9):
        io.save_checkpoint(state(step, 300_000), folder / names.format(step))
        if step > 3 and "{" in names:
            io.remove_checkpoint(folder / names.format(step - 3))
        (folder / "done").write_text(str(step))


@pytest.mark.parametrize("names", ["last.ckpt", "step={}.ckpt"])
def test_no_random_kill_loses_the_run(shm, child, names):
    rng = random.Random(0)
    for round_ in range(8):
        folder = shm / f"{round_}"
        folder.mkdir()
        process = child(save_forever, folder, names)
        while not (folder / "done").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        done = int((folder / "done").read_text() or 1)
        found = find_resume(folder)
        loaded = SafeCheckpointIO().load_checkpoint(found)
        # The save after the last finished one may have got through as well.
        assert loaded["global_step"] >= done
        assert torch.equal(loaded["weights"], torch.full((300_000,), float(loaded["global_step"])))


def kill_at(call, folder):
    """Save over step 1 and die at the `call`-th system call that can change what is on disk."""
    count = 0

    def dying(real):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    SafeCheckpointIO().save_checkpoint(state(2), folder / "last.ckpt")
    os._exit(0)


def test_a_kill_at_every_boundary_of_an_overwrite_leaves_the_old_or_the_new(shm, child):
    """Only one name exists, so there is nothing to fall back to."""
    io, seen, call = SafeCheckpointIO(), [], 0
    while True:
        call += 1
        io.save_checkpoint(state(1), shm / "last.ckpt")
        process = child(kill_at, call, shm)
        process.join()
        loaded = io.load_checkpoint(find_resume(shm))
        seen.append(loaded["global_step"])
        assert verify(shm / "last.ckpt").global_step == loaded["global_step"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # 3 files, each: fsync, replace, fsync of the directory.
    assert len(seen) >= 9
    assert seen == sorted(seen)
    assert {1, 2} == set(seen)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [lambda d: d[:-7], lambda d: b"", lambda d: d[:99] + bytes([d[99] ^ 1]) + d[100:]])
def test_damage_is_refused_by_name(tmp_path, damage):
    io, path = SafeCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(state(3), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*resume=auto"):
        io.load_checkpoint(path)


def test_damage_without_a_manifest_is_refused_by_name(tmp_path):
    path = tmp_path / "foreign.ckpt"
    torch.save(state(3) | {"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path)
    assert SafeCheckpointIO().load_checkpoint(path)["global_step"] == 3
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"foreign\.ckpt cannot be read"):
        SafeCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("content", [{"a": 1}, [1], torch.zeros(2)], ids=["dict", "list", "tensor"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match=r"foreign\.ckpt is no checkpoint of a training .*init=dir:FOLDER"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "foreign.ckpt")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (self.target,))


def test_a_checkpoint_that_runs_code_is_refused_on_load(tmp_path):
    torch.save({"x": Payload(str(tmp_path / "ran"))}, tmp_path / "evil.ckpt")
    for weights_only in (None, True, False):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt"):
            SafeCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=weights_only)
    assert not (tmp_path / "ran").exists()


def save_with_limit(folder, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        SafeCheckpointIO().save_checkpoint(state(2, 1_000_000), folder / "last.ckpt")
    except CheckpointError as error:
        named = all(part in str(error) for part in ("last.ckpt could not be saved", "ulimit -f", "resume=auto"))
        os._exit(17 if named else 18)
    os._exit(0)


@pytest.mark.parametrize("megabytes", [0, 8])  # fails when the buffer is flushed, fails in the middle
def test_disk_full_keeps_the_previous_checkpoint_and_says_so(tmp_path, megabytes):
    """The temporary file's name leads to /dev/full, where every write fails with ENOSPC."""
    io, path = SafeCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    before = sorted(os.listdir(tmp_path))
    temporary_name(path).symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"no space to save .*last\.ckpt: No space left.* free\. .*resume=auto"):
        io.save_checkpoint(state(2, 10 + megabytes * 2**18), path)
    assert sorted(os.listdir(tmp_path)) == before
    assert io.load_checkpoint(find_resume(tmp_path))["global_step"] == 1


def test_a_limit_on_the_size_of_files_is_told_from_a_full_disk(tmp_path, child):
    io = SafeCheckpointIO()
    io.save_checkpoint(state(1), tmp_path / "last.ckpt")
    before = sorted(os.listdir(tmp_path))
    process = child(save_with_limit, tmp_path, 100_000)
    process.join()
    assert process.exitcode == 17
    assert sorted(os.listdir(tmp_path)) == before
    assert io.load_checkpoint(find_resume(tmp_path))["global_step"] == 1


class Interrupts:
    """Ctrl-C in the middle of a save: in the write itself, or in between, while torch pickles."""

    def __init__(self, monkeypatch, where):
        target, name = (HashingWriter, "write") if where == "write" else (torch.storage.UntypedStorage, "nbytes")
        real = getattr(target, name)

        def interrupted(*args):
            if where == "write" and args[0].size < 1000:
                return real(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(target, name, interrupted)


@pytest.mark.parametrize("where", ["write", "between"])
def test_ctrl_c_in_a_save_stays_ctrl_c(tmp_path, monkeypatch, where):
    """torch.save turned it into "RuntimeError: unexpected pos 9965440 vs 9965332"."""
    io = SafeCheckpointIO()
    io.save_checkpoint(state(1), tmp_path / "last.ckpt")
    before = sorted(os.listdir(tmp_path))
    with monkeypatch.context() as patch:
        Interrupts(patch, where)
        with pytest.raises(KeyboardInterrupt):
            io.save_checkpoint(state(2), tmp_path / "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == before
    assert io.load_checkpoint(find_resume(tmp_path))["global_step"] == 1


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize("bad", [np.float64(1.0), Colour.RED, functools.partial(int), np.zeros(2)], ids=repr)
def test_objects_are_refused_when_saving_and_the_entry_is_named(tmp_path, bad):
    with pytest.raises(CheckpointError, match=r"checkpoint\['callbacks'\]\['Mine'\]\[1\]"):
        SafeCheckpointIO().save_checkpoint({"global_step": 1, "callbacks": {"Mine": [0, bad]}}, tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []


def test_hyper_parameters_become_plain_and_objects_in_them_are_left_out(tmp_path, caplog):
    hparams = OmegaConf.create({"width": 8, "twice": "${width}"})
    checkpoint = {
        "hyper_parameters": {"model": hparams, "optimizer": functools.partial(int), "shape": (1, 2), "path": tmp_path},
        "hparams_type": type(hparams),
    }
    with caplog.at_level(logging.WARNING):
        SafeCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == {
        "hyper_parameters": {"model": {"width": 8, "twice": 8}, "shape": [1, 2], "path": str(tmp_path)}
    }
    assert "hyper_parameters['optimizer'] (partial)" in caplog.text


def test_model_checkpoint_keeps_last_and_removes_manifests(tmp_path, tiny):
    """save_last=True writes last.ckpt a second time through the plugin; top-k removal takes the manifest along."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_last=True, save_top_k=1)
    tiny(tmp_path, 8, [keep])
    names = {"step=8.ckpt", "last.ckpt"}
    assert set(os.listdir(tmp_path)) == names | {f"{name}.manifest.json" for name in names}
    assert {verify(tmp_path / name).global_step for name in names} == {8}
    assert json.loads(manifest_path(tmp_path / "last.ckpt").read_text())["previous"] is None


def test_a_linked_last_is_checked_through_its_target(tmp_path, tiny):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_last="link", save_top_k=-1)
    tiny(tmp_path, 4, [keep])
    assert (tmp_path / "last.ckpt").is_symlink()
    assert SafeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
    flip(tmp_path / "step=4.ckpt")
    with pytest.raises(CheckpointError, match=r"step=4\.ckpt is damaged"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
