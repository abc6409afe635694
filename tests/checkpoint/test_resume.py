"""Which checkpoint a run continues from, and that it says what it skipped."""

import logging
import os

import pytest
import torch

from lit_reason.checkpoint import SafeCheckpointIO, find_resume
from lit_reason.checkpoint.manifest import manifest_path
from lit_reason.errors import CheckpointError


@pytest.fixture
def run(tmp_path):
    """Steps 9, 10 and 100: names sort 10 < 100 < 9, and mtimes are turned round."""
    folder = tmp_path / "checkpoints"
    for step in (9, 10, 100):
        path = folder / f"step={step}.ckpt"
        SafeCheckpointIO().save_checkpoint({"global_step": step, "w": torch.full((5000,), float(step))}, path)
        os.utime(path, (10**9 - step, 10**9 - step))
    return tmp_path


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))


def test_newest_is_by_global_step(run):
    assert find_resume(run).name == "step=100.ckpt"
    assert find_resume(run, "never") is None
    assert find_resume(run / "nothing") is None


@pytest.mark.parametrize("how", ["truncated", "damaged"])
def test_a_damaged_newest_falls_back_and_says_so(run, caplog, how):
    damage(run / "checkpoints" / "step=100.ckpt", how)
    with caplog.at_level(logging.WARNING):
        assert find_resume(run).name == "step=10.ckpt"
    assert "step=100.ckpt" in caplog.text and how in caplog.text and "step=10.ckpt (global step 10)" in caplog.text


def test_a_damaged_manifest_counts_as_damage(run, caplog):
    manifest_path(run / "checkpoints" / "step=100.ckpt").write_text('{"format": 1')
    assert find_resume(run).name == "step=10.ckpt"
    assert "step=100.ckpt.manifest.json is damaged" in caplog.text


def test_an_unfinished_save_is_skipped(run, caplog):
    manifest_path(run / "checkpoints" / "step=100.ckpt").unlink()
    assert find_resume(run).name == "step=10.ckpt"
    assert "did not finish" in caplog.text


def test_all_damaged_never_starts_from_scratch_silently(run):
    for path in (run / "checkpoints").glob("*.ckpt"):
        damage(path, "damaged")
    with pytest.raises(CheckpointError, match=r"every checkpoint.*step=9\.ckpt.*resume=never"):
        find_resume(run)


def test_a_path_is_taken_or_refused(run, caplog):
    path = run / "checkpoints" / "step=10.ckpt"
    assert find_resume(run, path) == path
    assert "step=100.ckpt" in caplog.text
    assert find_resume("elsewhere", run).name == "step=100.ckpt"
    damage(path, "truncated")
    with pytest.raises(CheckpointError, match=r"step=10\.ckpt is truncated"):
        find_resume(run, str(path))
    with pytest.raises(CheckpointError, match=r"resume=atuo.*did you mean 'auto'"):
        find_resume(run, "atuo")
    with pytest.raises(CheckpointError, match=rf"no finished checkpoint in this folder\. Type .*resume={run}"):
        find_resume("elsewhere", run.parent)


def test_several_without_a_manifest_were_copied_and_are_not_thrown_away(run):
    """A killed first save leaves one checkpoint without a manifest; starting anew beside several loses a run."""
    paths = sorted((run / "checkpoints").glob("*.ckpt"))
    for path in paths:
        manifest_path(path).unlink()
    with pytest.raises(CheckpointError, match=r"none of .*step=10\.ckpt.*\.manifest\.json.*resume=PATH.*resume=never"):
        find_resume(run)
    assert find_resume(run, paths[0]) == paths[0]
    for path in paths[1:]:
        path.unlink()
    assert find_resume(run) is None


def test_a_file_that_cannot_be_read_is_damage(run, caplog):
    manifest = manifest_path(run / "checkpoints" / "step=100.ckpt")
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")  # reading it fails with EIO, as on a bad sector
    with caplog.at_level(logging.WARNING):
        assert find_resume(run).name == "step=10.ckpt"
    assert "step=100.ckpt.manifest.json cannot be read: Input/output error" in caplog.text
