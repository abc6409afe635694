"""The console script, stopped in mid-round and started again by the same command, equals a run in one go."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from lit_reason import zoo

# Two rewards of random text that vary within a group, and a callback that writes down every token id and, once, sends
# this process the signal that a user or a cluster would.
PACKAGE = """
import json, os, signal
from pathlib import Path
from lightning.pytorch import Callback

class Share:
    def __init__(self, of, weight=1.0):
        self.of, self.weight = {"even": lambda t: t % 2 == 0, "ascii": lambda t: t < 128}[of], weight
    def __call__(self, prompts, completions):
        return [sum(map(self.of, c.token_ids)) / len(c.token_ids) for c in completions]

class Watch(Callback):
    def __init__(self, folder, stop_at=None):
        self.folder, self.stop_at = Path(folder), stop_at
    def on_rollout(self, trainer, pl_module, groups, advantages_B, step):
        rows = [[c.prompt_id, c.token_ids, c.logprobs] for group in groups for c in group.completions]
        with open(self.folder / "tokens.jsonl", "a") as file:
            file.write(json.dumps([step, rows]) + "\\n")
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        mark = self.folder / "stopped"
        if trainer.global_step + 1 == self.stop_at and not mark.exists():
            mark.touch()  # during step number stop_at
            os.kill(os.getpid(), signal.SIGTERM)
"""
# 10 rounds of 2 epochs x 2 minibatches are 40 optimizer steps; step 17 is the first of the fifth round's four.
COMMAND = [
    *("init=null", "model=tiny", "data.source.size=300", "extras.threads=1", "evaluation.n=0", "reward=[]"),
    *("allow_targets=[watched]", "+reward.even={_target_: watched.Share, of: even}"),
    *("+reward.ascii={_target_: watched.Share, of: ascii, weight: 0.5}", "rollout.sampling.max_tokens=8"),
    *("rollout.shape.rounds=10", "rollout.shape.prompts_per_round=4", "rollout.shape.group_size=4"),
    *("rollout.shape.epochs=2", "rollout.shape.minibatches=2", "rollout.shape.micro_batches=2", "optimizer.lr=0.005"),
    "callbacks=[checkpoint,rng,save_on_signal,progress,completions,report]",
]


def start(folder, stop_at):
    """One process of the console script in `folder`: its exit code and what it says."""
    watch = f"+callbacks.watch={{_target_: watched.Watch, folder: ., stop_at: {stop_at}}}"
    command = [sys.executable, "-m", "lit_reason.cli.train", *COMMAND, watch]
    environment = {**os.environ, "PYTHONPATH": str(folder.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def records(folder):
    """What a run leaves: each round's token ids and engine log-probs, its completions, its steps, its weights."""
    run = folder / "runs" / "run" / "rl"
    tokens = [json.loads(line) for line in (folder / "tokens.jsonl").open()]
    lines = [json.loads(text) for path in sorted((run / "completions").iterdir()) for text in path.open()]
    steps = [json.loads(text) for text in (run / "metrics" / "steps.jsonl").open()]
    steps = [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in steps]
    return tokens, lines, steps, zoo.load(run / "model").model.state_dict()


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "watched.py").write_text(PACKAGE)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "cut"


def test_a_run_stopped_at_step_17_of_40_and_started_again_equals_one_in_one_go(folders):
    whole, cut = folders
    code, said = start(whole, stop_at="null")
    assert code == 0, said
    code, said = start(cut, stop_at=17)
    print(said)
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 17, saved" in said and "the same command" in said
    assert "step 17/40" in said and "step 18/40" not in said
    code, said = start(cut, stop_at=17)
    print(said)
    assert code == 0, said
    assert "interrupted.ckpt" in said and "step 17/40" not in said and "step 18/40" in said and "step 40/40" in said

    tokens, lines, steps, weights = records(whole)
    assert [step for step, _ in tokens] == list(range(0, 40, 4)) and len(lines) == 10 * 16
    assert [row["step"] for row in steps] == list(range(40))
    assert sum(row["grad_norm"] > 0 for row in steps) == 40  # every step learns: equality says something
    tokens_2, lines_2, steps_2, weights_2 = records(cut)
    assert tokens_2 == tokens
    assert lines_2 == lines  # rewards, advantages, texts, policy versions
    assert steps_2 == steps
    assert weights_2.keys() == weights.keys() and all(torch.equal(weights_2[name], weights[name]) for name in weights)
