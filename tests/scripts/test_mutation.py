"""mutate_objectives.py: what its operators change, and that a fork's tests see the changed module and no other."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def operators(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("mutation.operators")


@pytest.fixture
def changes(operators, tmp_path):
    """`changes(source)`: {(class, operator): [changes]}."""

    def of(source, name="formula.py"):
        (tmp_path / name).write_text(source)
        found = {}
        for mutant in operators.mutants(tmp_path / name):
            found.setdefault((mutant.kind, mutant.operator), []).append(mutant.change.partition(" -> ")[2])
        return found

    return of


@pytest.mark.parametrize(
    ("line", "kind", "operator", "after"),
    [
        ("a - b", "core", "arithmetic", ["a + b"]),
        ("a - b", "core", "operands swapped", ["b - a"]),
        ("a / b", "core", "arithmetic", ["a * b"]),
        ("a / b", "core", "denominator dropped", ["a"]),
        ("-a", "core", "minus dropped", ["a"]),
        ("a.sum()", "core", "denominator", ["a.mean()"]),
        ("a.tokens_total", "core", "denominator", ["a.sequences_total"]),
        ("a.detach()", "core", "stop-gradient dropped", ["a"]),
        ("ratio_BT * b", "core", "stop-gradient added", ["ratio_BT.detach() * b"]),
        ("k1(new_BT, ref_BT)", "core", "arguments swapped", ["k1(ref_BT, new_BT)"]),
        ("a < b", "other", "comparison", ["a <= b", "a > b"]),
        ("a & ~b", "other", "boolean", ["a | ~b"]),
        ("a & ~b", "other", "not dropped", ["a & b"]),
        ("a.clamp(min=b)", "other", "bound", ["a.clamp(max=b)"]),
        ("torch.minimum(a, b)", "other", "bound", ["torch.maximum(a, b)"]),
        ("torch.where(c, a, b)", "other", "branches swapped", ["torch.where(c, b, a)"]),
        ("a.any(dim=1)", "other", "constant", ["a.any(dim=0)"]),
        ("a.masked_fill(b, 0)", "other", "constant", ["a.masked_fill(b, 1)"]),
        ("a.masked_fill(b, 0)", "other", "call dropped", ["a"]),
        ("0.5 * a", "other", "constant", ["2 * a", "1 * a"]),
        ("a if b else c", "other", "condition", ["a if not b else c"]),
    ],
)
def test_operators(changes, line, kind, operator, after):
    found = changes(f"def f(a, b, c):\n    return {line}\n")
    assert found[kind, operator] == [f"return {one}" for one in after]


def test_what_is_left_alone(changes):
    source = '''
def f(a: int | None = -1, *, b: float = 0.5) -> int | None:
    """1 - 2 < 3."""
    if b:
        raise ValueError(f"{a - 1}" + str(2 * 3))

@torch.no_grad()
def g(ratio_BT):
    return ratio_BT.detach()
'''
    assert changes(source) == {("other", "condition"): ["not b"]}
    assert ("core", "stop-gradient added") not in changes("def f(ratio_BT):\n    return 2 * ratio_BT\n", "advantage.py")
    assert changes("def f(ratio_BT):\n    return ratio_BT < 1\n").keys() == {
        ("other", "comparison"),
        ("other", "constant"),
    }


DRIVER = """
import sys
from collections import Counter
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from mutation.fork import Order, run_tests
from mutation.operators import mutants
folder = Path(sys.argv[2])
order = lambda: Order(Counter(), {})
tests = [str(folder / "test_formula.py")]
print("bare", run_tests(None, "formula", tests, order(), 60).killer)
for mutant in mutants(folder / "formula.py"):
    killer = run_tests(mutant, "formula", tests, order(), 8).killer
    print(mutant.change.partition(" -> ")[2], killer and killer.rpartition("::")[2])
"""


def test_a_fork_runs_the_tests_against_the_changed_module(tmp_path):
    """A sign that a test sees, one that none sees, and a condition that never ends."""
    (tmp_path / "formula.py").write_text(
        "def f(a, b):\n    while b > 0:\n        b -= 1\n    return a - b\n\ndef unseen(a):\n    return -a\n"
    )
    (tmp_path / "test_formula.py").write_text(
        "from formula import f\ndef test_f():\n    assert f(3, -1) == 4 and f(3, 2) == 3\n"
    )
    command = [sys.executable, "-c", DRIVER, str(SCRIPTS), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    assert said[0] == "bare None"
    assert "return a + b test_f" in said and "return a None" in said
    assert "b < 0 time" in said
    assert (tmp_path / "formula.py").read_text().startswith("def f(a, b):\n    while b > 0")
