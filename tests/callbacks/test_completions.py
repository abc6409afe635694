"""Nothing is lost, nothing is doubled: one file per round, dropped and redone on resume."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_reason.callbacks import CompletionsTable
from lit_reason.errors import LitReasonError, RolloutError
from lit_reason.types import Completion, Prompt, RewardState, RolloutGroup, Scores


def group(step, prompt="p"):
    done = [Completion(prompt, i, (1, 2, 3), (0.0,) * 3, f"text {step}.{i}", "stop", step, 100 + i) for i in range(2)]
    values = torch.tensor([[1.0, 0.5], [float("nan"), 0.25]])
    states = torch.tensor([[0, 0], [int(RewardState.TIMEOUT), 0]])
    scores = Scores(("answer", "length"), torch.tensor([1.0, 2.0]), values, states, {(1, "answer"): "too slow"})
    return RolloutGroup(Prompt(prompt, "1+1?", "2", "test"), done, scores)


def announce(module, step):
    for callback in module.trainer.callbacks:
        if hasattr(callback, "on_rollout"):
            callback.on_rollout(module.trainer, module, [group(step)], torch.tensor([0.5, -0.5]), step)


def read(folder):
    return [json.loads(line) for path in sorted(folder.glob("step-*.jsonl")) for line in path.read_text().splitlines()]


def test_every_column_of_every_completion(fit, tmp_path):
    fit([CompletionsTable()], steps=3, module=fit.Tiny(announce))
    rows = read(tmp_path / "completions")
    assert [(r["step"], r["sample_idx"]) for r in rows] == [(s, i) for s in range(3) for i in range(2)]
    assert rows[2] == {
        "step": 1,
        "prompt_id": "p",
        "sample_idx": 0,
        "source": "test",
        "question": "1+1?",
        "answer": "2",
        "text": "text 1.0",
        "rewards": {"answer": 1.0, "length": 0.5},
        "faults": {},
        "total": 2.0,
        "advantage": 0.5,
        "version": 1,
        "age": None,
        "finish_reason": "stop",
        "tokens": 3,
        "seed": 100,
    }
    assert rows[3]["rewards"] == {"answer": None, "length": 0.25} and rows[3]["faults"] == {"answer": "too slow"}
    assert rows[3]["total"] is None and rows[3]["advantage"] == -0.5


def test_the_age_is_that_of_the_weights_in_a_module_that_counts_them(fit, tmp_path):
    """Step 2 trains version 4; its completions began with version 2, and a third of them is of version 3."""

    def announce_aged(module, step):
        module.policy_version = step + 2
        done = [replace(c, switches=((2, step + 1),)) for c in group(step).completions]
        aged = replace(group(step), completions=done)
        module.trainer.callbacks[0].on_rollout(module.trainer, module, [aged], torch.tensor([0.5, -0.5]), step)

    fit([CompletionsTable()], steps=3, module=fit.Tiny(announce_aged))
    rows = read(tmp_path / "completions")
    assert [r["version"] for r in rows] == [0, 0, 1, 1, 2, 2]
    assert [r["age"] for r in rows] == pytest.approx([(2 + 2 + 1) / 3] * 6)


def test_resume_redoes_the_lost_steps_once(fit, tmp_path):
    # saved after step 2 (every 2), killed after step 3: steps 2 and on are done again
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit([CompletionsTable(), saver], steps=3, module=fit.Tiny(announce), enable_checkpointing=True)
    stale = tmp_path / "completions" / "step-00000002.jsonl"
    stale.write_text(stale.read_text().replace("text 2.0", "stale"))
    seen = {}

    def watch(module, step):
        seen.setdefault("before", [r["step"] for r in read(tmp_path / "completions")])
        announce(module, step)

    fit([CompletionsTable()], steps=5, module=fit.Tiny(watch), ckpt_path=tmp_path / "ckpt" / "step=2.ckpt")
    assert seen["before"] == [0, 0, 1, 1]
    rows = read(tmp_path / "completions")
    assert [r["step"] for r in rows] == [s for s in range(5) for _ in range(2)]
    assert "stale" not in str(rows)


def test_a_fresh_start_moves_a_former_run_aside(fit, tmp_path):
    for _ in range(2):
        fit([CompletionsTable()], steps=2, module=fit.Tiny(announce))
    assert len(read(tmp_path / "completions")) == len(read(tmp_path / "completions.old-1")) == 4


def test_a_file_of_somebody_else_is_left_alone(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit([CompletionsTable(), saver], steps=2, module=fit.Tiny(announce), enable_checkpointing=True)
    for name in ("step-notes.jsonl", "step-00000001.mine.jsonl"):
        (tmp_path / "completions" / name).write_text("{}\n")
    fit([CompletionsTable()], steps=2, module=fit.Tiny(announce), ckpt_path=tmp_path / "ckpt" / "step=1.ckpt")
    assert sorted(p.name for p in (tmp_path / "completions").iterdir()) == [
        "step-00000000.jsonl",
        "step-00000001.jsonl",
        "step-00000001.mine.jsonl",
        "step-notes.jsonl",
    ]


def test_a_full_disk_stops_with_one_message(fit, tmp_path):
    def full(module, step):
        if step == 1:
            (tmp_path / "completions" / "step-00000001.jsonl.partial").symlink_to("/dev/full")
        announce(module, step)

    with pytest.raises(LitReasonError, match=r"step-00000001\.jsonl could not be written: No space left.*resume=auto"):
        fit([CompletionsTable()], module=fit.Tiny(full))
    assert [r["step"] for r in read(tmp_path / "completions")] == [0, 0]


def test_two_rounds_in_one_step_are_both_kept(fit, tmp_path):
    def twice(module, step):
        announce(module, step)
        announce(module, step)

    fit([CompletionsTable(str(tmp_path / "mine"))], steps=1, module=fit.Tiny(twice))
    assert len(read(tmp_path / "mine")) == 4


def test_wrong_number_of_advantages_is_an_error(fit):
    def wrong(module, step):
        module.trainer.callbacks[0].on_rollout(module.trainer, module, [group(0)], torch.zeros(3), step)

    with pytest.raises(RolloutError, match="3 advantages for 2 completions"):
        fit([CompletionsTable()], module=fit.Tiny(wrong))
