"""One writer per run directory; a configuration that does not fit the checkpoints is refused."""

import logging
import os

import pytest
import yaml

from lit_reason.checkpoint import RunDir, SafeCheckpointIO, find_resume
from lit_reason.errors import CheckpointError, ConfigError

CONFIG = {"model": {"width": 64, "base": {"depth": 4}}, "tokenizer": "bytes", "seed": 1, "optimizer": {"lr": 0.1}}


def changed(**kwargs):
    return {**CONFIG, **kwargs}


def save(run, step):
    SafeCheckpointIO().save_checkpoint({"global_step": step}, run.checkpoints / f"step={step}.ckpt")


def try_to_enter(path):
    try:
        RunDir(path).acquire()
    except ConfigError as error:
        os._exit(17 if "in use by process" in str(error) and "run_dir=ANOTHER" in str(error) else 18)
    os._exit(0)


def test_two_processes_cannot_write_one_run(tmp_path, child):
    path = tmp_path / "run"
    with RunDir(path):
        process = child(try_to_enter, path)
        process.join()
        assert process.exitcode == 17
    process = child(try_to_enter, path)
    process.join()
    assert process.exitcode == 0


def test_layout_and_config(tmp_path):
    with RunDir(tmp_path / "run") as run:
        run.start(CONFIG)
        assert yaml.safe_load(run.config_file.read_text()) == CONFIG
        assert all(f.is_dir() for f in (run.checkpoints, run.metrics, run.completions, run.samples))
        run.start(CONFIG)
        assert sorted(p.name for p in run.path.glob("config*")) == ["config.yaml"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    with RunDir(tmp_path / "run") as run:
        save(run, 1)
    (run.checkpoints / ".step=2.ckpt.123.tmp").write_bytes(b"half")
    with run:
        names = sorted(p.name for p in run.checkpoints.iterdir())
    assert names == ["step=1.ckpt", "step=1.ckpt.manifest.json"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(model={"width": 128, "base": {"depth": 4}}), r"model\.width: got 128, saved 64"),
        (changed(model={"width": 64, "base": {"depth": 8}}), r"model\.base\.depth: got 8, saved 4"),
        (changed(model={"width": 64}), r"model\.base\.depth: got '\(absent\)', saved 4"),
        (changed(tokenizer="x/y"), r"tokenizer: got 'x/y', saved 'bytes'"),
    ],
)
def test_shape_changes_are_refused_once_there_is_a_checkpoint(tmp_path, config, words):
    with RunDir(tmp_path / "run") as run:
        run.start(CONFIG)
        run.start(config)
        run.start(CONFIG)
        save(run, 1)
        with pytest.raises(CheckpointError, match=words):
            run.start(config)
        assert yaml.safe_load(run.config_file.read_text()) == CONFIG


def test_other_changes_are_told_and_the_former_config_kept(tmp_path, caplog):
    with RunDir(tmp_path / "run") as run:
        run.start(CONFIG)
        save(run, 1)
        with caplog.at_level(logging.WARNING):
            run.start(changed(optimizer={"lr": 0.2}))
        assert "optimizer.lr: got 0.2, saved 0.1" in caplog.text
        assert yaml.safe_load((run.path / "config.1.yaml").read_text()) == CONFIG
        assert yaml.safe_load(run.config_file.read_text())["optimizer"] == {"lr": 0.2}


@pytest.mark.parametrize("text", ["", "model: [1", "- 1", "\0"])
def test_a_damaged_config_is_named_once_a_checkpoint_depends_on_it(tmp_path, text):
    with RunDir(tmp_path / "run") as run:
        run.config_file.write_text(text)
        run.start(CONFIG)
        assert yaml.safe_load(run.config_file.read_text()) == CONFIG
        save(run, 1)
        run.config_file.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.yaml is damaged .*delete it.*resume=never"):
            run.start(CONFIG)
        assert run.config_file.read_text() == text


def test_a_long_refusal_names_some_keys_and_counts_the_rest(tmp_path):
    with RunDir(tmp_path / "run", locked=["model"]) as run:
        run.start({"model": {f"a{i}": 0 for i in range(30)}})
        save(run, 1)
        with pytest.raises(CheckpointError, match=r"model\.a0: got 1, saved 0;.*; and 22 more\. Set") as refused:
            run.start({"model": {f"a{i}": 1 for i in range(30)}})
        assert str(refused.value).count("got 1, saved 0") == 8


def dies_at(call, path):
    """Start with another configuration and die at the `call`-th rename."""
    real = os.replace

    def dying(*args):
        nonlocal call
        call -= 1
        if call == 0:
            os._exit(9)
        real(*args)

    os.replace = os.rename = dying
    RunDir(path).start(changed(seed=2))
    os._exit(0)


def test_a_kill_never_leaves_checkpoints_without_the_config_they_were_trained_with(tmp_path, child):
    codes = []
    while codes[-1:] != [0]:
        path = tmp_path / f"{len(codes)}"
        with RunDir(path) as run:
            run.start(CONFIG)
        process = child(dies_at, len(codes) + 1, path)
        process.join()
        codes.append(process.exitcode)
        assert yaml.safe_load(run.config_file.read_text()) in (CONFIG, changed(seed=2))
    assert codes == [9, 9, 0]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_place_that_cannot_be_a_run_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"run_dir=.* cannot be used \(.*\)\. .*run_dir=ANOTHER"):
        RunDir(tmp_path / place).acquire()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_start_gives_the_lock_back(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics").write_text("not a folder")
    run = RunDir(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"File exists: .*metrics"):
        run.acquire()
    (tmp_path / "run" / "metrics").unlink()
    with RunDir(tmp_path / "run"), pytest.raises(ConfigError, match="in use"):
        run.acquire()


def test_never_sets_the_former_run_aside(tmp_path):
    """Else the next resume=auto would take the former run's step 1000 for this run's."""
    with RunDir(tmp_path / "run") as run:
        run.start(CONFIG)
        save(run, 1000)
        run.start(changed(model={"width": 8}), resume="never")
        assert find_resume(run.path) is None
        save(run, 3)
        assert find_resume(run.path).name == "step=3.ckpt"
        assert find_resume(run.path / "old-1").name == "step=1000.ckpt"
