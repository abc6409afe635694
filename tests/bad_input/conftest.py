"""The training script's own steps in this process on a tiny model: exit code and what it says on stderr.

Without `hydra.main`, which composes the tree several times more: tests/cli runs the scripts whole.
"""

import json
import shutil

import pytest

from lit_reason.cli import train as script
from lit_reason.cli.launch import apply_extras, clean_errors
from lit_reason.config.compose import compose
from lit_reason.config.stage import without_hydra

SMALL = [
    *("model=tiny", "init=null", "evaluation.n=0", "extras.threads=1", "run_dir=run"),
    *("rollout.shape.rounds=3", "rollout.shape.prompts_per_round=2", "rollout.shape.group_size=2"),
    *("rollout.shape.micro_batches=1", "rollout.sampling.max_tokens=8", "trainer.precision=32-true"),
    *("callbacks=[checkpoint,rng,completions,report,nan_guard]", "callbacks.checkpoint.every_n_train_steps=1"),
]


def call(*argv):
    """The script's exit code."""
    size = [] if "data=jsonl" in argv else ["data.source.size=60"]
    try:
        with clean_errors():
            cfg = without_hydra(compose("train", [*SMALL, *size, *argv]))
            script.check(cfg)
            apply_extras(cfg.extras)
            script.run(cfg)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train(*overrides) -> (exit code, stderr) in a folder of its own; an error that is not ours fails the test."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        capsys.readouterr()
        return call(*overrides), capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of three steps; its first two checkpoints are kept."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("callbacks.checkpoint.save_top_k=-1") == 0
    (folder / "run" / "rl" / "checkpoints" / "step=3.ckpt").unlink()
    return folder / "run"


@pytest.fixture
def cut_off(finished, tmp_path):
    """A copy of the finished run as if it had been killed in its third step."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "rl" / "done.json").unlink()
    shutil.rmtree(tmp_path / "run" / "rl" / "model")
    return tmp_path / "run" / "rl"


@pytest.fixture
def same_end(finished):
    """same_end(stage folder): its weights are bit for bit those of the undisturbed run, every step recorded once."""

    def check(folder):
        rows = [json.loads(line)["step"] for line in (folder / "metrics" / "steps.jsonl").open()]
        assert rows == [0, 1, 2]
        assert sorted(path.name[:13] for path in (folder / "completions").iterdir()) == [f"step-{i:08d}" for i in rows]
        weights = "model/model.safetensors"
        return (folder / weights).read_bytes() == (finished / "rl" / weights).read_bytes()

    return check
