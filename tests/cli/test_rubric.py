"""The node `rubric`: what a run does with it, and which of its keys a resumed run may change."""

import csv
import json

import pytest

from lit_reason.checkpoint import RunDir
from lit_reason.cli import train
from lit_reason.config import stage_config
from lit_reason.config.compose import compose
from lit_reason.config.stage import without_hydra
from lit_reason.errors import CheckpointError

CONDITION = "rubric.conditions.length={on: answer, at_least: 1.0}"


def settings(*line):
    cfg = stage_config(without_hydra(compose("train", ["experiment=arith_gdpo", *line])), "rl")
    return cfg, train._settings(cfg)


def start(folder, saved, *line):
    """Start in `folder` as if a run with the settings `saved` had left a checkpoint there."""
    cfg, now = settings(*line)
    with RunDir(folder, locked=train.LOCKED) as run:
        run.start(saved)
        (run.checkpoints / "step=1.ckpt").touch()
        run.start(now, fill=lambda then: train._filled(cfg, then))


def test_a_run_from_before_the_node_goes_on(tmp_path):
    _, saved = settings()
    del saved["rubric"]
    saved["rollout"]["max_fault_fraction"] = 0.02
    start(tmp_path / "plain", saved)
    with pytest.raises(CheckpointError, match=r"rubric\.conditions\.length\.at_least: got 1\.0, saved '\(absent\)'"):
        start(tmp_path / "other", saved, CONDITION)


def test_transforms_are_locked_and_the_limit_of_faults_is_not(tmp_path):
    _, saved = settings(CONDITION)
    start(tmp_path / "same", saved, CONDITION, "rubric.max_fault_fraction=0.5")
    for line in ([], [CONDITION, "rubric.scale.length=2"], [CONDITION, "rubric.weights.length=2"]):
        with pytest.raises(CheckpointError, match=r"rubric\.(conditions|scale|weights)"):
            start(tmp_path / "other", saved, *line)


def test_training_sees_the_transformed_columns_and_the_evaluation_the_verdicts(tmp_path):
    """At most 8 tokens are within 20: the verdict is 1 for every completion; x 3 and clipped at 2.5 it is 2.5."""
    line = [
        *("stages=[rl]", "init=null", "model=tiny", "data.source.size=300", "evaluation.n=4", "callbacks=[report]"),
        *("reward=[answer,length]", "reward.length.max_tokens=20", "reward.length.buffer=0"),
        *("rollout.sampling.max_tokens=8", "rollout.shape.rounds=1", "rollout.shape.prompts_per_round=2"),
        *("rollout.shape.group_size=2", "rollout.shape.micro_batches=1", f"run_dir={tmp_path}/run"),
        *("rubric.scale.length=3", "rubric.clip.length=[0,2.5]", "extras.threads=1", "logger=csv"),
    ]
    cfg = without_hydra(compose("train", line))
    train.check(cfg)
    train.run(cfg)
    folder = tmp_path / "run" / "rl"
    rows = [
        row for path in folder.rglob("*.csv") for row in csv.DictReader(path.open()) if row.get("reward/length/mean")
    ]
    assert [float(row["reward/length/mean"]) for row in rows] == [2.5]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rewards"]["length"]["before"] == 1.0, summary
    assert "rubric:" in (folder / "model" / "README.md").read_text()
