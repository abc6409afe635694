"""The golden files, the shipped algorithms, and the script that compares them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
READ = (
    *("batch_main.json", "objectives_main.json", "gdpo_collapse.json", "edge_cases.json"),
    *("kl_entropy_gkd.json", "ppo_critic.json", "zero_one_view.json"),
)


@pytest.fixture(scope="session")
def checker():
    """scripts/check_objectives.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))  # where Python looks when the script is run
    spec = importlib.util.spec_from_file_location("check_objectives", ROOT / "scripts" / "check_objectives.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def golden():
    """A function: file name -> its content."""
    return lambda name: json.loads((GOLDEN / name).read_text())


@pytest.fixture
def golden_copy(tmp_path):
    """A folder with copies of the files that the script reads, to be changed."""
    for name in READ:
        (tmp_path / name).write_text((GOLDEN / name).read_text())
    return tmp_path
