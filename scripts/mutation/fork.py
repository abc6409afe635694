"""Tests against a changed module, in a fork of a process that has everything else imported: seconds, not minutes."""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from mutation.operators import Mutant

# What the tests import besides the mutated package and what depends on it.
WARM = ("hydra.utils", "lightning", "omegaconf", "rich.console", "rich.table", "torch.optim", "transformers")
WARM_HERE = ("types", "errors", "models", "optim", "data", "rollout", "sandbox", "rewards", "loop")
REPEATED = ("test_the_whole_folder",)  # what other tests check one by one


@dataclass
class Outcome:
    """What the tests said. `killer`: the test that failed, "import", "time" or "crash"; None: all passed."""

    killer: str | None
    seconds: float
    durations: dict[str, float] = field(default_factory=dict)


@dataclass
class Order:
    """A pytest plugin: the tests that have killed most come first, then the quick ones; notes who fails, and times."""

    kills: Counter[str]
    durations: dict[str, float]
    failed: str | None = None
    took: dict[str, float] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (-self.kills[item.nodeid], self.durations.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
        if report.failed and self.failed is None:
            self.failed = report.nodeid


class Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Gives one module the mutant's code; all others are found as ever."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        super().__init__(module, str(path))
        self.module, self.code = module, code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        return self.code


def warm(package: str) -> None:
    """Imports what every test run needs and no mutant changes."""
    for name in (*WARM, *(f"lit_reason.{name}" for name in WARM_HERE)):
        importlib.import_module(name)
    early = sorted(name for name in sys.modules if name.startswith(package))
    gc.freeze()  # or every fork's first collection would walk, and copy, all that is imported
    if early:
        raise RuntimeError(f"{early[0]} is imported before any mutant: take what imports it out of WARM_HERE")


def run_tests(mutant: Mutant | None, module: str, tests: Sequence[str], order: Order, limit: float) -> Outcome:
    """Runs `tests` in a fork until the first failure.

    Args:
        mutant: None is the code as it is.
        module: the mutant's module.
        limit: seconds after which it counts as killed (an endless loop).
    """
    start = time.perf_counter()
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            _in_child(mutant, module, tests, order, writer, folder)
        os.close(writer)
        said = b""
        while (left := limit - (time.perf_counter() - start)) > 0 and select.select([reader], [], [], left)[0]:
            if not (more := os.read(reader, 65536)):
                break
            said += more
        os.close(reader)
        if left <= 0 or not said:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    if not said:
        return Outcome("time" if seconds >= limit else "crash", seconds)
    record = json.loads(said)
    if record["code"] not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {record['code']} for {mutant.key if mutant else 'the code as it is'}")
    return Outcome(None if record["code"] == 0 else record["failed"] or "import", seconds, record["took"])


def _in_child(mutant: Mutant | None, module: str, tests: Sequence[str], order: Order, writer: int, folder: str) -> None:
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        if mutant is not None:
            sys.meta_path.insert(0, Changed(module, mutant.path, mutant.code()))
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        options = [
            "-x",
            "-q",
            "-k",
            f"not ({' or '.join(REPEATED)})",
            "--tb=no",
            "--assert=plain",
            "-p",
            "no:cacheprovider",
            f"--basetemp={folder}/t",
        ]
        code = pytest.main([*options, *tests], plugins=[order])
        with os.fdopen(writer, "w") as pipe:
            json.dump({"code": int(code), "failed": order.failed, "took": order.took}, pipe)
    finally:
        os._exit(0)
