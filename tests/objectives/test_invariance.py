"""One optimizer step, one gradient: micro-batches, packing and ranks change it by rounding only, for every YAML."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOLERANCE = 1e-5  # of the gradient's norm, in float32
_spec = importlib.util.spec_from_file_location("invariance", Path(__file__).with_name("invariance.py"))
step = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(step)


def distance(got, expected):
    assert got.isfinite().all() and expected.norm() > 1e-4
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def whole():
    """The gradient of a whole step as one batch, packed, on one process, by name."""
    made = {}

    def of(name):
        if name not in made:
            model, objective = step.make_model(), step.load(name)
            made[name] = step.accumulate(step.Loss(model, objective), step.micro_batches(objective, model, 1))
        return made[name]

    return of


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """`{(name, world size): gradient}` of DDP over gloo."""
    out = tmp_path_factory.mktemp("ranks") / "gradients.pt"
    subprocess.run([sys.executable, step.__file__, str(out)], check=True, timeout=600)
    return torch.load(out)


@pytest.mark.parametrize("name", step.NAMES)
def test_micro_batches(whole, name):
    for count in (2, 4, 8):
        model, objective = step.make_model(), step.load(name)
        got = step.accumulate(step.Loss(model, objective), step.micro_batches(objective, model, count))
        assert distance(got, whole(name)) < TOLERANCE, count


@pytest.mark.parametrize("name", step.NAMES)
def test_packing(whole, name):
    """Every row by itself, its padding computed, against prompts that rows share and no padding."""
    for count in (1, 4):
        model, objective = step.make_model(), step.load(name)
        batches = step.micro_batches(objective, model, count)
        got = step.accumulate(step.Loss(step.Padded(model), objective), batches)
        assert distance(got, whole(name)) < TOLERANCE, count


@pytest.mark.parametrize("name", step.NAMES)
def test_ranks(whole, on_ranks, name):
    for world in step.WORLDS:
        assert distance(on_ranks[name, world], whole(name)) < TOLERANCE, world


def test_a_rank_that_divides_by_its_own_tokens_would_be_noticed(whole, on_ranks):
    assert distance(on_ranks["own totals", 1], whole("dapo")) < TOLERANCE
    assert all(distance(on_ranks["own totals", world], whole("dapo")) > 0.1 for world in (2, 4))


def test_the_step_has_what_could_go_wrong():
    """Holes within a completion, rows and a whole group that do not count, a micro-batch without any token."""
    parts = step.micro_batches(step.load("grpo"), step.make_model(), 8)
    on_BT = step.make_round(step.load("grpo"), step.make_model())[0].mask_BT
    inside_BT = (on_BT.cumsum(1) > 0) & (on_BT.flip(1).cumsum(1).flip(1) > 0)
    assert (inside_BT & (on_BT == 0)).any()
    assert on_BT.sum(1).unique().numel() > 5
    assert [float(part.mask_BT.sum()) for part in parts].count(0.0) == 2
    assert {float(part.prompts_total) for part in parts} == {3.0}
