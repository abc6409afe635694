"""Programs run in the sandbox; whatever they do, the policy reads a text."""

import os
import signal
import time
from pathlib import Path

import pytest

from lit_reason.environments import Python, ToolFault
from lit_reason.errors import ConfigError, RewardError


@pytest.fixture(scope="module")
def python():
    return Python(timeout_s=1.5, memory_mb=256, max_chars=300)


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("print(12*7)", "84"), ("x = 5\nx * 2", "10"), ("None", "(no output)"), ("x = 1", "(no output)"),
        ("", "(no output)"),
        ("1/0", "ZeroDivisionError: division by zero"), ("print(1)\nfoo", "1\nNameError: name 'foo' is not defined"),
        ("import sys; sys.exit(3)", "SystemExit: 3"), ("'é' * 600", "é" * 300), ("'😀' * 600", "😀" * 300),
        ("from fractions import Fraction\nFraction(1, 3) + 1", "4/3"), ("'a' * 10**9", "MemoryError:"),
        ("open('/tmp/x', 'w')", "error: forbidden: open"), ("open('/etc/hostname').read()", "error: forbidden: open"),
        ("import sysconfig\nopen(sysconfig.get_paths()['stdlib'] + '/../../../x')", "error: forbidden: open"),
        ("import os\nos.open('/etc/hostname', 0)", "error: forbidden: open"),
        ("open(b'/etc/hostname')", "error: forbidden: open"), ("open('worker.py')", "error: forbidden: open"),
        ("import pathlib\npathlib.Path('/etc/hostname').read_text()", "error: forbidden: open"),
        ("import os\nos.system('id')", "error: forbidden: os.system"),
        ("import _socket\n_socket.socket()", "error: forbidden: socket.__new__"),
    ],
)  # fmt: skip
def test_answers(python, program, answer):
    assert python([program]) == [answer]


def test_programs_of_a_turn_share_nothing_and_are_answered_in_order(python):
    programs = ["import math\nmath.pi = 3", "import math\nmath.floor(math.pi * 100)", "while True: print('x')", "1+1"]
    start = time.monotonic()
    assert python(programs) == ["(no output)", "314", "error: no result within 1.5 s", "2"]
    assert time.monotonic() - start < 8


def test_random_numbers_are_the_same_in_every_run(python):
    first = python(["import random\nrandom.random()"] * 2)
    assert first[0] == first[1] == Python(max_chars=300)(["import random\nrandom.random()"])[0]


def test_a_program_that_kills_itself_is_answered(python):
    assert python(["import os\nos.abort()"]) == [
        "error: the scorer was killed by signal 6 and gave no verdict of its own"
    ]


def test_a_sandbox_that_fails_is_a_fault_and_no_answer():
    python = Python()
    assert python(["1"]) == ["1"]
    worker = python.sandbox._idle[0]
    python.sandbox._take = lambda: worker  # a worker that is gone, each time
    os.killpg(worker._process.pid, signal.SIGKILL)
    (answer,) = python(["2"])
    assert isinstance(answer, ToolFault) and answer.message.startswith("the sandbox failed: ")


def test_without_the_wall_it_refuses_where_the_wall_is_demanded(monkeypatch):
    import shutil

    from lit_reason.sandbox import launch

    monkeypatch.setattr(shutil, "which", lambda name: None)
    launch.bubblewrap.cache_clear()
    with pytest.raises(RewardError, match="isolation=auto"):
        Python(isolation="bwrap")(["1"])


def test_the_longest_answer_fits_one_reply():
    assert Python(max_chars=700)(["'😀' * 700"]) == ["😀" * 700]
    with pytest.raises(ConfigError, match="1 to 700"):
        Python(max_chars=701)


def test_the_trainer_never_loads_the_runner():
    source = "".join(p.read_text() for p in (Path(__file__).parents[2] / "lit_reason" / "environments").glob("*.py"))
    assert "python_runner" not in source
