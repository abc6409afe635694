"""Every case of scripts/bench_kernels.py with Triton on our side, tiny and interpreted: it runs, and is right."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

from bench.kernels_cases import GROUPS, cases
from bench.kernels_measure import Place, checks

INTERPRETED = Place(torch.device("cpu"), "triton", "triton")
CASES = {f"{case.group}, {case.kind}": case for group in GROUPS if group != "ceilings" for case in cases(group, True)}
WHOLE_LAYERS = ("moe",)  # two products behind each other: their differences add up


@pytest.mark.parametrize("name", CASES)
def test_ours_runs_and_is_right(name):
    torch.manual_seed(0)
    case = CASES[name]
    found = checks(case.make(INTERPRETED, *case.shape))
    assert found["repeats"] and found.get("exact", True)
    assert found.get("diff", 0) < (4e-3 if case.group in WHOLE_LAYERS else 1e-3)
    assert found.get("largest", 0) <= 0
