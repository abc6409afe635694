"""The same run on 1, 2 and 4 processes: the same completions, gradients and metrics."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.loop import RoundShape


def start(*arguments):
    command = [sys.executable, str(Path(__file__).with_name("ranks_run.py")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run(devices: int, folder: Path, algorithm: str):
    out = folder / f"{devices}.pt"
    done = start(devices, out, algorithm)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def test_the_number_of_processes_changes_no_gradient(tmp_path):
    """GDPO normalises over the whole round, so a process that saw its own share only would be far off."""
    one = run(1, tmp_path, "gdpo")
    for devices in (2, 4):
        many = run(devices, tmp_path, "gdpo")
        assert many["rounds"] == one["rounds"]
        assert len(many["gradients"]) == len(one["gradients"]) == 4
        for mine, whole in zip(many["gradients"], one["gradients"], strict=True):
            for name, gradient in whole.items():
                assert (mine[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, (devices, name)
        for name, value in one["metrics"].items():
            # Quantiles do not average; a prompt whose rows are dealt to two batches is replayed in both.
            if not name.startswith(("ratio/q", "speed/", "router/replayed")):
                assert many["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), (devices, name)


def test_if_one_process_fails_all_say_why(tmp_path):
    """The first process waits for nothing: it names the one that failed, and its error."""
    done = start(2, tmp_path / "out.pt", "gdpo", 1)
    assert done.returncode != 0
    assert "process 1 failed, and with it the round: OSError: the judge's server is gone" in done.stderr


def test_a_step_that_cannot_be_dealt_evenly_is_refused():
    shape = RoundShape(prompts_per_round=2, group_size=4, micro_batches=4)
    shape.check_ranks(2)
    with pytest.raises(ConfigError, match=r"8 sequences per optimizer step.*micro_batches=4 times 3 processes"):
        shape.check_ranks(3)
