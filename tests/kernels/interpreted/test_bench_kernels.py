"""Every case of scripts/bench_kernels.py with Triton on our side, tiny and interpreted: it runs, and is right."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from bench.kernels_cases import GROUPS, cases  # noqa: E402
from bench.kernels_measure import OURS, Place, measure  # noqa: E402

INTERPRETED = Place(torch.device("cpu"), "triton", "triton")
CASES = {f"{case.group}, {case.kind}": case for group in GROUPS for case in cases(group, dry=True)}
WHOLE_LAYERS = ("moe",)  # two products behind each other: their differences add up


@pytest.mark.parametrize("name", CASES)
def test_ours_runs_and_is_right(name):
    row = measure(CASES[name], INTERPRETED, seconds=0)
    if CASES[name].group == "ceilings":
        assert "copy" in row["sides"] or "bf16" in row["sides"]
        return
    assert "ms" in row["sides"][OURS], row["sides"][OURS]
    checks = row["checks"]
    assert checks["repeats"] and checks.get("exact", True)
    assert checks.get("diff", 0) < (4e-3 if CASES[name].group in WHOLE_LAYERS else 1e-3)
    assert checks.get("largest", 0) <= 0
