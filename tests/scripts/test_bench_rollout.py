"""The benchmark's own arithmetic and work; of the sides the builtin engine and transformers run, on a little of it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def bench(load):
    return load("bench_rollout")


def test_the_work_repeats_prompts_and_spreads_lengths(bench):
    prompts, limits = bench.Work(prompts=40, group=5).requests()
    assert len(prompts) == len(limits) == 200
    assert all(prompts[i] == prompts[i - i % 5] for i in range(200)) and len(set(map(tuple, prompts))) == 40
    assert 16 <= min(map(len, prompts)) <= 20 and 60 <= max(map(len, prompts)) <= 64
    assert 16 <= min(limits) <= 22 and 250 <= max(limits) <= 256
    assert bench.Work(prompts=40, group=5).requests() == (prompts, limits)


def run(tokens: float, push: float = 0.01) -> dict[str, float]:
    return {
        "tokens_per_s": tokens,
        "tokens_per_processor_s": tokens / 2,
        "wall_s": 1.0,
        "processor_s": 2.0,
        "push_s": push,
    }


def test_ratios_are_of_neighbouring_runs_and_judged_by_their_median(bench):
    runs = {"builtin": [run(30), run(40), run(90)], "transformers": [run(10), run(20), run(20)], "vllm": [run(10)] * 3}
    found = bench.summary(runs, step_s=2.0)
    assert found["ratio_to_transformers_tokens_per_s"] == {"min": 2.0, "median": 3.0, "max": 4.5}
    assert found["ratio_to_vllm_tokens_per_processor_s"] == {"min": 3.0, "median": 4.0, "max": 9.0}
    assert found["push"]["share"]["median"] == pytest.approx(0.005)
    assert bench.failures(found) == []
    slow = bench.summary({**runs, "builtin": [run(15, 0.1)] * 3}, step_s=2.0)
    assert [line.split(";")[0] for line in bench.failures(slow)] == [
        "0.75 times transformers's speed",
        "1.50 times vllm's speed",
        "a push is 5.0% of a step",
    ]
    alone = bench.summary({"builtin": runs["builtin"]}, step_s=None)
    assert bench.failures(alone) == [] and "push" not in alone


def test_the_bound_is_reading_weights_and_caches(bench):
    """10 rows: a step reads 100 + 10 * 20 = 300 bytes, 2 steps in a second."""
    assert bench.bandwidth_bound(100, 20, rows=10, bytes_per_s=600) == pytest.approx(20)


def test_the_sweep_goes_axis_by_axis(bench, monkeypatch):
    monkeypatch.setitem(bench.BEST, "toy", {"x": 1, "y": "a"})
    monkeypatch.setitem(bench.AXES, "toy", {"x": [1, 2], "y": ["a", "b"]})
    speeds = {(1, "a"): 1.0, (2, "a"): 5.0, (2, "b"): 7.0, (1, "b"): 99.0}
    best, trials = bench.sweep("toy", lambda settings: speeds[settings["x"], settings["y"]])
    assert best == {"x": 2, "y": "b"} and len(trials) == 3


@pytest.mark.parametrize("side", ["builtin", "transformers"])
def test_a_side_makes_every_token_that_was_asked(bench, tmp_path, side):
    work = bench.Work(prompts=3, group=2, min_prompt=2, max_prompt=5, min_tokens=1, max_tokens=6)
    torch.manual_seed(0)
    model = bench.save_hf(bench.Transformer(work.config()), tmp_path / "model")
    record = bench.run(side, work, bench.BEST[side] | {"threads": 1}, model, "cpu")
    assert record["tokens"] == sum(work.requests()[1]) and record["tokens_per_s"] > 0
    assert ("push_s" in record) == (side == "builtin")
