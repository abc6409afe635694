"""The benchmark's own arithmetic: work, statistics, sweep. The contestants are not run here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bench(load):
    return load("bench_rl_step")


@pytest.fixture(scope="module")
def work_module(bench):
    return sys.modules[bench.Work.__module__]


def test_work_counts_tokens_and_prompts(bench):
    work = bench.Work(prompts=3, group=5, completion=7, prompt=4, steps=2)
    assert work.tokens == 3 * 5 * 7
    prompts = work.prompt_ids()
    assert len(prompts) == 2 * 3 and all(len(ids) == 4 for ids in prompts)
    assert all(0 <= token < work.vocab for ids in prompts for token in ids)


def test_summary_drops_warm_up_and_splits_the_step(bench, work_module):
    work = bench.Work(prompts=1, group=2, completion=50, steps=4, warmup=1)
    clock = work_module.Clock([9.0, 2.0, 4.0, 3.0], [8.0, 0.5, 1.0, 2.0])
    result = work_module.summarise(work, clock, 1.0)
    assert result["step_s"] == 3.0 and result["generate_s"] == 1.0
    assert result["tokens_per_s"] == pytest.approx(100 / 3.0)
    assert result["train_s"] == 1.5  # the median of 1.5, 3.0, 1.0


def test_a_step_that_was_not_timed_is_an_error(bench, work_module):
    work = bench.Work(steps=3)
    with pytest.raises(RuntimeError, match="3 steps"):
        work_module.Clock([1.0, 1.0, 1.0], [1.0, 1.0]).check(work)


def test_ratios_are_of_neighbouring_runs(bench):
    def run(tokens: float, train: float) -> dict:
        keys = ("tokens_per_s", "step_s", "generate_s", "generate_tokens_per_s", "peak_rss_mib")
        return {**dict.fromkeys(keys, tokens), "train_s": train}

    runs = {"lit_reason": [run(30.0, 1.0), run(20.0, 2.0)], "trl": [run(10.0, 4.0), run(5.0, 4.0)]}
    summary = bench.summary(runs)
    assert summary["ratio_tokens_per_s"] == {"min": 3.0, "median": 3.5, "max": 4.0}
    assert summary["ratio_train_speed"] == {"min": 2.0, "median": 3.0, "max": 4.0}
    assert "ratio_tokens_per_s" not in bench.summary({"trl": runs["trl"]})


def test_sweep_takes_the_best_of_each_axis(bench, monkeypatch, capsys):
    speeds = {(1, "a"): 1.0, (2, "a"): 5.0, (2, "b"): 7.0, (1, "b"): 99.0}

    def run_side(python, side, work, settings):
        return {"tokens_per_s": speeds[settings["x"], settings["y"]], "peak_rss_mib": 1.0}

    monkeypatch.setattr(bench, "run_side", run_side)
    side = bench.Side("s", "s.py", {"x": 1, "y": "a"}, {"x": [1, 2], "y": ["a", "b"]})
    best, trials = bench.sweep(Path("python"), side, bench.Work())
    assert best == {"x": 2, "y": "b"}
    assert [t["settings"] for t in trials] == [{"x": 1, "y": "a"}, {"x": 2, "y": "a"}, {"x": 2, "y": "b"}]


def test_warm_up_must_leave_a_step(bench, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--steps", "2", "--warmup", "2"])
    assert "--warmup 2" in capsys.readouterr().err


def test_an_earlier_measurement_is_not_overwritten(bench, tmp_path):
    paths = []
    for _ in range(3):
        paths.append(bench.free_path("today", tmp_path))
        paths[-1].write_text("{}")
    assert [path.name for path in paths] == ["today.json", "today-2.json", "today-3.json"]
