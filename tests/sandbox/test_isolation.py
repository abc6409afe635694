import logging
import os
import shutil

import pytest

from lit_reason.errors import RewardError
from lit_reason.sandbox import Sandbox, launch
from lit_reason.types import RewardState

SCORER = """
import socket, os
def prepare(payload): pass
def is_prepared(payload): return True
def score(payload): return eval(payload["code"])
"""


@pytest.fixture
def scorer(tmp_path):
    path = tmp_path / "scorer.py"
    path.write_text(SCORER)
    return path


def test_without_bubblewrap_auto_says_so_once(scorer, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    launch.bubblewrap.cache_clear()
    with caplog.at_level(logging.WARNING), Sandbox(scorer) as first, Sandbox(scorer) as second:
        assert [pool.score([{"code": "0.5"}])[0].value for pool in (first, second)] == [0.5, 0.5]
    assert [record.message for record in caplog.records if "bubblewrap" in record.message] == [
        "bubblewrap (bwrap) is not installed: scorers run under resource limits and an audit hook only"
    ]


def test_required_bubblewrap_fails_closed(scorer, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    launch.bubblewrap.cache_clear()
    with pytest.raises(RewardError, match="isolation=auto"), Sandbox(scorer, isolation="bwrap") as pool:
        pool.score([{"code": "0.5"}])


def test_a_bubblewrap_that_does_not_work_counts_as_none(scorer, monkeypatch, tmp_path, caplog):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'no permission' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    launch.bubblewrap.cache_clear()
    with Sandbox(scorer) as pool:
        assert pool.score([{"code": "0.5"}])[0].value == 0.5
    assert "no permission" in caplog.text
    launch.bubblewrap.cache_clear()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_inside_bubblewrap_there_is_no_network_and_only_own_processes(scorer):
    with Sandbox(scorer, isolation="bwrap") as pool:
        codes = [
            "len(socket.if_nameindex())",
            "sum(name.isdigit() for name in os.listdir('/proc'))",
            "os.access('/', os.W_OK)",
        ]
        interfaces, processes, writable = pool.score([{"code": code} for code in codes])
    assert interfaces.value == 1  # the loopback
    assert processes.value <= 4 < sum(name.isdigit() for name in os.listdir("/proc"))
    assert writable.state is RewardState.OK and writable.value == 0
