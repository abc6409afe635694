"""The record of every step, exact over a resume, and the files at the end."""

import json
import resource
import statistics

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_reason.callbacks import NonFiniteGuard, Report
from lit_reason.callbacks.report import standard_errors
from lit_reason.errors import LitReasonError
from lit_reason.report.records import read_rows
from lit_reason.types import Completion, Prompt, RolloutGroup, Scores


def groups(values_PG):
    found = []
    for p, values in enumerate(values_PG):
        done = [Completion(str(p), i, (1,), (0.0,), "x", "stop", 0, i) for i in range(len(values))]
        values_BR = torch.tensor(values)[:, None]
        scores = Scores(("answer",), torch.ones(1), values_BR, torch.where(values_BR.isnan(), 1, 0))
        found.append(RolloutGroup(Prompt(str(p), "", "", "t"), done, scores))
    return found


def announce(module, step):
    module.log("reward/answer/mean", 0.5 + step / 100)
    # a new round every second step
    if step % 2 == 0:
        for callback in module.trainer.callbacks:
            if hasattr(callback, "on_rollout"):
                values = [[1.0, 0.0], [0.0, 0.0], [1.0, step / 10]]
                callback.on_rollout(module.trainer, module, groups(values), torch.zeros(6), step)


def rows(path):
    return [json.loads(line) for line in (path / "metrics" / "steps.jsonl").read_text().splitlines()]


def test_standard_error_is_clustered_by_prompt():
    nan = float("nan")
    got = standard_errors(groups([[1.0, 0.0], [0.0, 0.0], [1.0, nan], [nan, nan]]))
    # prompt means 0.5, 0, 1; the last prompt has none
    assert got == {"reward/answer/se": pytest.approx(statistics.stdev([0.5, 0.0, 1.0]) / 3**0.5)}


def test_every_step_is_recorded_and_drawn(fit, tmp_path, capsys):
    fit([Report(title="A <run>")], steps=4, module=fit.Tiny(announce), accumulate_grad_batches=2)
    got = rows(tmp_path)
    assert [r["step"] for r in got] == [0, 1, 2, 3]
    assert [r["reward/answer/mean"] for r in got] == pytest.approx([0.5, 0.51, 0.52, 0.53])
    assert all(r["loss"] > 0 for r in got)
    first, second = (statistics.stdev([0.5, 0.0, x]) / 3**0.5 for x in (0.5, 0.6))
    assert [r["reward/answer/se"] for r in got] == pytest.approx([first, first, second, second])
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;run&gt;" in page and "<run>" not in page
    assert "reward/answer/mean" in capsys.readouterr().out


def test_resume_in_the_middle_of_a_round_gives_the_same_record(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = tmp_path / "whole"
    fit([Report(str(whole)), saver], steps=5, module=fit.Tiny(announce), enable_checkpointing=True)
    parts = tmp_path / "parts"
    fit([Report(str(parts))], steps=4, module=fit.Tiny(announce))
    fit([Report(str(parts))], steps=5, module=fit.Tiny(announce), ckpt_path=tmp_path / "ckpt" / "step=3.ckpt")
    assert [r["step"] for r in rows(parts)] == [0, 1, 2, 3, 4]
    assert [r["reward/answer/se"] for r in rows(parts)] == [r["reward/answer/se"] for r in rows(whole)]


def test_a_failed_run_still_gets_its_report_and_its_own_error(fit, tmp_path):
    with pytest.raises(ArithmeticError):
        fit([NonFiniteGuard(), Report()], module=fit.Tiny(announce, bad_step=2))
    assert [r["step"] for r in rows(tmp_path)] == [0, 1] and (tmp_path / "report.html").exists()


def test_a_fresh_start_keeps_the_former_record(fit, tmp_path):
    for steps in (3, 2):
        fit([Report()], steps=steps, module=fit.Tiny(announce))
    assert len(rows(tmp_path)) == 2
    assert len((tmp_path / "metrics" / "steps.old-1.jsonl").read_text().splitlines()) == 3


def test_a_record_that_cannot_grow_stops_with_one_message(fit, tmp_path, caplog):
    """A limit on the size of files stands for the full disk; the report at the end meets it as well."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(module, step):
        if step == 1:
            size = (tmp_path / "metrics" / "steps.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))

    try:
        with pytest.raises(LitReasonError, match=r"steps\.jsonl could not be written: File too large.*resume=auto"):
            fit([Report()], module=fit.Tiny(limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "no report: " in caplog.text
    assert [row["step"] for row in read_rows(tmp_path / "metrics" / "steps.jsonl")] == [0]
