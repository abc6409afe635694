"""The way of imports, and what the source must not contain. Nothing is imported: the files are parsed."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for d in ("lit_reason", "kernels") for p in (ROOT / d).rglob("*.py") if "conf" not in p.parts)
# A module imports its own rank and lower ones.
ORDER = [
    ("types", "errors", "__init__"),
    ("models", "optim"),
    ("data",),
    ("rollout",),
    ("sandbox",),
    ("environments",),
    ("rewards",),
    ("objectives",),
    ("modules", "sync"),
    ("checkpoint", "callbacks", "evaluate", "report", "zoo", "config"),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
RUNNER = ROOT / "lit_reason" / "sandbox" / "python_runner.py"  # runs the policy's programs, in the sandbox's children
OUTSIDE = {"loop"}  # handed callables; may read records and is read by modules


def part(path):
    return path.relative_to(ROOT / "lit_reason").parts[0].removesuffix(".py")


def imports(path, package="lit_reason"):
    """Parts of the package that a file imports at run time (not under TYPE_CHECKING)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == package and len(name.split(".")) > 1:
                yield name.split(".")[1], node.lineno


@pytest.mark.parametrize("path", [p for p in FILES if "lit_reason" in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = part(path)
    for target, line in imports(path):
        if target == own or target.startswith("__"):
            continue
        assert target in RANK or target in OUTSIDE, f"{path}:{line}: give lit_reason.{target} a place in ORDER"
        if own in OUTSIDE:
            allowed = target in ("types", "errors")
        elif target in OUTSIDE:
            allowed = RANK[own] >= RANK["modules"]
        else:
            allowed = RANK[target] <= RANK[own]
        assert allowed, f"{path}:{line}: {own} must not import {target}"


def test_every_part_has_a_place():
    parts = {part(p) for p in FILES if "lit_reason" in p.parts}
    assert parts <= set(RANK) | OUTSIDE


@pytest.mark.parametrize("path", [p for p in FILES if "kernels" in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_stand_alone(path):
    assert list(imports(path)) == []


def test_nothing_of_ours_is_importable_as_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels.py").exists() and not (ROOT / "lit_reason" / "kernels.py").exists()


def test_tests_have_no_packages_and_the_root_no_conftest():
    assert not (ROOT / "conftest.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def calls(path):
    """(dotted name of the callee, call node) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_is_read_from_files(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = (getattr(node, "module", None) or "") if isinstance(node, ast.ImportFrom) else ""
        for name in (*names, module):
            assert name.split(".")[0] not in ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"), path
    for name, node in calls(path):
        where = f"{path}:{node.lineno}: {name}"
        keywords = {k.arg: k.value for k in node.keywords}
        if name in ("torch.load", "trainer.fit", "load_from_checkpoint"):
            safe = keywords.get("weights_only")
            assert isinstance(safe, ast.Constant) and safe.value is True, f"{where} without weights_only=True"
        executes = name in ("eval", "exec") and path != RUNNER
        assert not executes and name not in ("os.system", "os.popen", "yaml.load", "hydra.utils.instantiate"), where
        trust = keywords.get("trust_remote_code")
        assert trust is None or (isinstance(trust, ast.Constant) and trust.value is False), where
        shell = keywords.get("shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), where


def test_no_checkpoint_comes_over_plain_http():
    found = [p for p in FILES if re.search(r"http://(?!localhost|127\.)", p.read_text(encoding="utf-8"))]
    assert found == []
