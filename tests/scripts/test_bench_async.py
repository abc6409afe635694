"""What the benchmark of generation beside training makes of a run's files."""

import json
import os

import pytest


@pytest.fixture(scope="module")
def bench(load):
    return load("bench_async")


def write_run(folder, times, step_s):
    """Rounds of 4 completions of 5 tokens, `step_s` apart; each generated in 2 s and trained in 0.5 s."""
    (folder / "completions").mkdir(parents=True)
    (folder / "metrics").mkdir()
    rows = []
    for step in range(times):
        path = folder / "completions" / f"step-{step:08d}.jsonl"
        path.write_text("{}\n" * 4)
        when = 1000.0 + (step * 50.0 if step < 3 else 100 + (step - 2) * step_s)  # slow at first
        os.utime(path, (when, when))
        row = {"step": step, "completion/length": 5.0, "speed/generate_tokens_per_s": 10.0, "speed/wait_s": 0.25}
        row |= {"speed/sync_s": 0.01, "rollout/age/mean": 1.0, "mismatch/kl": 0.001}
        rows.append(row | ({"speed/train_tokens_per_s": 40.0} if step else {}))
    (folder / "metrics" / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"pass_at_1_after": 0.5 + step_s / 100}))


def test_a_run_in_seconds(bench, tmp_path):
    write_run(tmp_path / "run", 8, step_s=2.5)
    found = bench.measure("synchronous", 1, tmp_path / "run")
    assert found["step_s"] == pytest.approx(2.5) and found["wait_s"] == 0.25
    assert found["generate_s"] == pytest.approx(4 * 5 / 10) and found["train_s"] == pytest.approx(4 * 5 / 40)
    assert found["held_out"] == 0.525


def test_arms_are_compared_seed_by_seed(bench, tmp_path):
    runs = []
    for arm, steps in (("synchronous", (3.0, 4.0)), ("staleness 1", (2.0, 2.0))):
        for seed, step_s in enumerate(steps, 1):
            folder = tmp_path / f"{arm}{seed}"
            write_run(folder, 8, step_s)
            runs.append(bench.measure(arm, seed, folder))
    summary = bench.summarise(runs)
    assert summary["staleness 1"]["times_shorter"].mean == pytest.approx((3 / 2 + 4 / 2) / 2)
    difference = summary["staleness 1"]["held_out_minus"]  # -0.01 and -0.02: +- 12.7062 x 0.00707 / sqrt(2)
    assert difference.mean == pytest.approx(-0.015)
    assert difference.low == pytest.approx(-0.015 - 12.7062 * 0.005)
    assert "times_shorter" not in summary["synchronous"]


def test_the_arms_differ_in_staleness_alone(bench):
    class Settings:
        engine, evaluate, rounds, overrides = "process", 0, 10, ["rollout.log_kl=false"]

    one, other = (bench.training(arm, 1, Settings) for arm in ("synchronous", "staleness 1"))
    differ = set(one.overrides) ^ set(other.overrides)
    assert differ == {"rollout.shape.staleness=0", "rollout.shape.staleness=1"}
    assert one.command(bench.FOLDER)[:3] == ["taskset", "-c", "0"] and one.name != other.name
