"""What goes wrong in the middle of a run: it stops with one message, what was saved is whole, and it can go on."""

import hashlib
import logging
import multiprocessing
import resource
import shutil

import pytest
import torch

from lit_reason.checkpoint import RunDir, find_resume

REWARD = """
import sys
from pathlib import Path

class Mine:
    def __init__(self, weight: float = 0.0):
        self.weight, self.rounds = weight, 0

    def __call__(self, prompts, completions):
        self.rounds += 1
        if self.rounds == 2 and Path("broken").exists():
            sys.exit(0)
        return [1.0] * len(completions)
"""


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_broken_reward_stops_the_run_and_the_mended_one_goes_on(train, tmp_path, same_end, monkeypatch):
    """sys.exit(0) in a reward once ended the run as if it were finished."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "broken").touch()
    line = ("allow_targets=[my_rewards]", "+reward.mine._target_=my_rewards.Mine")
    code, said = train(*line)
    assert code == 1 and "reward 'mine' failed on 4 of 4 completions (allowed: 1.0%); the first: SystemExit: 0" in said
    assert find_resume("run/rl").name == "step=1.ckpt"
    (tmp_path / "broken").unlink()
    assert train(*line)[0] == 0
    assert same_end(tmp_path / "run" / "rl")  # a reward of weight 0 changes no number


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_manifest(path):
    path.with_name(path.name + ".manifest.json").unlink()


@pytest.mark.parametrize("damage", [truncate, lose_manifest])
def test_a_damaged_newest_checkpoint_costs_its_steps_only(train, cut_off, same_end, damage, caplog):
    damage(cut_off / "checkpoints" / "step=2.ckpt")
    with caplog.at_level(logging.INFO):
        code, _ = train("callbacks.checkpoint.save_top_k=-1")
    assert code == 0 and same_end(cut_off)
    assert "step=2.ckpt" in caplog.text and "step=1.ckpt (global step 1)" in caplog.text


def test_nothing_whole_is_refused_and_never_sets_it_aside(train, cut_off, same_end):
    for path in (cut_off / "checkpoints").glob("*.ckpt"):
        flip(path)
    before = digests(cut_off / "checkpoints")
    code, said = train("callbacks.checkpoint.save_top_k=-1")
    assert code == 1 and "every checkpoint in" in said and "resume=never" in said
    assert digests(cut_off / "checkpoints") == before
    assert train("callbacks.checkpoint.save_top_k=-1", "resume=never")[0] == 0
    assert same_end(cut_off) and digests(cut_off / "old-1" / "checkpoints") == before


def test_a_full_disk_keeps_what_was_saved_and_the_run_goes_on_with_space(train, cut_off, same_end):
    """A limit on the size of files stands for the full disk: records fit, a checkpoint does not."""
    before = digests(cut_off / "checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code, said = train("callbacks.checkpoint.save_top_k=-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "step=3.ckpt could not be saved" in said and "Earlier checkpoints are untouched" in said
    assert digests(cut_off / "checkpoints") == before
    assert train("callbacks.checkpoint.save_top_k=-1")[0] == 0
    assert same_end(cut_off)


def test_a_loss_that_is_nan_stops_before_it_is_saved(train, tmp_path):
    code, said = train(
        *("stages=[sft]", "trainer.max_steps=6", "priming.n_examples=20", "optimizer.lr=1e30"),
        *("optimizer.warmup_steps=0", "trainer.gradient_clip_val=null"),
    )
    assert code == 1 and "NonFiniteError: " in said and "resume" not in said
    paths = list((tmp_path / "run" / "sft" / "checkpoints").glob("*.ckpt"))
    assert paths and not (tmp_path / "run" / "sft" / "done.json").exists()
    for path in paths:
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in weights.values())
        # counters of the step that failed would be counted twice
        assert all(value.sum() == 0 for name, value in weights.items() if name.endswith("load_E"))


def hold(path, held, done):
    with RunDir(path):
        held.set()
        done.wait(60)


def test_a_run_directory_in_use_is_refused_and_left_alone(train, cut_off):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(cut_off, held, done), daemon=True)
    other.start()
    assert held.wait(60)
    before = digests(cut_off / "checkpoints")
    code, said = train()
    done.set()
    other.join()
    assert code == 2 and f"is in use by process {other.pid}" in said and "run_dir=ANOTHER" in said
    assert digests(cut_off / "checkpoints") == before


def test_a_file_where_the_run_should_be_is_refused_and_kept(train, cut_off):
    shutil.rmtree(cut_off)
    cut_off.write_text("mine")
    code, said = train()
    assert code == 2 and "cannot be used (File exists" in said and "run_dir=ANOTHER" in said
    assert cut_off.read_text() == "mine"
