"""Only lit_reason/sandbox may hand text to anything that evaluates it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lit_reason"
NAMES = {"eval", "exec", "compile", "__import__", "parse_expr", "sympify", "literal_eval"}
METHODS = {"parse_expr", "sympify", "score_answer", "get_score_answer_fn"}  # model.eval() and torch.compile() are fine
OWNERS = {"builtins": NAMES, "os": {"system", "popen"}}


def executions(source):
    """Line numbers of calls and mentions that execute text."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        name = isinstance(node, ast.Name) and node.id in NAMES
        owner = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
        attribute = isinstance(node, ast.Attribute) and (node.attr in METHODS or node.attr in OWNERS.get(owner, ()))
        if name or attribute:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source", ["eval(x)", "f = exec", "builtins.eval(x)", "sympy.parse_expr(x)", "d.score_answer(a, e)", "os.system(x)"]
)
def test_the_check_bites(source):
    assert executions(source) == [1]


def test_ordinary_code_passes():
    assert executions("model.eval(); torch.compile(model); re.compile('x')") == []


def test_no_file_outside_the_sandbox_executes_text():
    files = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "sandbox" not in path.parents]
    assert len(files) > 10
    assert {str(path): lines for path in files if (lines := executions(path.read_text()))} == {}


def test_the_trainer_imports_no_scorer():
    source = "".join(path.read_text() for path in (PACKAGE / "rewards").glob("*.py"))
    assert "import reasoning_gym" not in source and "from reasoning_gym" not in source
