"""Kernels in Triton's interpreter, which must be asked for before triton is imported: a process of its own.

TRITON_INTERPRET=1 pytest tests/kernels/interpreted        # `make test` does it
"""

import importlib.util
import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).parents[1] / "interpreter.py")
    assert spec is not None and spec.loader is not None
    interpreter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpreter)
    interpreter.mend()


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if not INTERPRETED and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET=1 pytest tests/kernels/interpreted runs these"))
