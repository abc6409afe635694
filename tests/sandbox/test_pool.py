"""The pool with scorers written for the test: what an evaluated answer can do, a scorer file can do more plainly."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lit_reason.errors import ConfigError, RewardError
from lit_reason.sandbox import Sandbox
from lit_reason.types import RewardState

OK, ERROR, TIMEOUT = RewardState.OK, RewardState.ERROR, RewardState.TIMEOUT
REPO = Path(__file__).parents[2]
# Evaluates the payload, which is what reasoning-gym's scorers amount to.
SCORER = """
    import json, os, sys, time
    CALLS = []
    def prepare(payload): pass
    def is_prepared(payload): return True
    def shareable(payload): return payload.get("share", False)
    def score(payload):
        CALLS.append(1)
        try:
            return eval(payload["code"])
        except Exception:
            if payload.get("swallow"):
                return 1.0
            raise
"""


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer") / "scorer.py"
    path.write_text(textwrap.dedent(SCORER))
    return path


@pytest.fixture(scope="module")
def sandbox(scorer):
    with Sandbox(scorer, timeout_s=0.4, memory_mb=256, isolation="limits") as pool:
        yield pool


def run(sandbox, *codes, **extra):
    return sandbox.score([{"code": code, **extra} for code in codes])


def only(sandbox, code, **extra):
    """The verdict of `code`; its neighbours must be scored all the same."""
    before, verdict, after = run(sandbox, "0.25", code, "0.75", **extra)
    assert (before.state, before.value, after.state, after.value) == (OK, 0.25, OK, 0.75)
    return verdict


def test_values_come_back_in_order(scorer):
    with Sandbox(scorer, workers=2, isolation="limits") as pool:
        for share in (True, False):
            verdicts = run(pool, *[f"{i}/8" for i in range(70)], share=share)
            assert [v.value for v in verdicts] == [i / 8 for i in range(70)]
            assert {v.state for v in verdicts} == {OK}
        assert pool.score([]) == []


@pytest.mark.parametrize("share", [False, True])
def test_a_hang_is_a_timeout_and_costs_its_deadline(sandbox, share):
    run(sandbox, "0")
    start = time.monotonic()
    verdict = only(sandbox, "time.sleep(60)", share=share)
    assert verdict.state is TIMEOUT and verdict.value != verdict.value and "0.4 s" in verdict.message
    assert 0.4 <= time.monotonic() - start < 3


def test_a_busy_loop_is_a_timeout(sandbox):
    assert only(sandbox, "9**9**9**9").state is TIMEOUT


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "code, why",
    [("os._exit(0)", "exit code 0"), ("os._exit(7)", "exit code 7"), ("exit()", "Exit"), ("[][1]", "IndexError")],
)
def test_a_crash_is_an_error_never_a_pass(sandbox, code, why, share):
    verdict = only(sandbox, code, share=share)
    assert verdict.state is ERROR and why in verdict.message


@pytest.mark.parametrize("code", ["float('nan')", "float('inf')", "'x'", "None", "[1]"])
def test_what_is_no_finite_number_is_an_error(sandbox, code):
    assert only(sandbox, code).state is ERROR


def test_printing_is_not_a_verdict(sandbox):
    forged = json.dumps({"nonce": "0", "verdicts": [["OK", 1.0, ""]]})
    verdict = only(sandbox, f"[print({forged!r}, flush=True), sys.stderr.write('x' * 10**5)] and 0.5")
    assert verdict.state is OK and verdict.value == 0.5


@pytest.mark.parametrize(
    "code",
    [
        "[os.write(fd, b'0 = 1.0\\n') for fd in range(30) if os.path.exists(f'/dev/fd/{fd}')] and os._exit(0)",
        "[os.write(fd, b'x' * 100000) for fd in range(3, 8) if os.path.exists(f'/dev/fd/{fd}')] and 1",
        "sys._getframe(2).f_locals['nonce']",
        "sys._current_frames()",
        "__import__('gc').get_objects()",
        "(lambda g: g.gi_frame)(x for x in ())",
        "sys.settrace(print)",
    ],
)
def test_forged_verdicts_fail(sandbox, code):
    assert only(sandbox, code, swallow=True).state is ERROR


@pytest.mark.parametrize(
    "code",
    [
        "os.system('touch {}')",
        "open('{}', 'w')",
        "os.open('{}', os.O_CREAT | os.O_WRONLY)",
        "os.mkdir('{}')",
        "os.symlink('/etc', '{}')",
        "os.posix_spawn('/usr/bin/touch', ['touch', '{}'], {{}})",
        "__import__('subprocess').run(['touch', '{}'])",
        "__import__('pathlib').Path('{}').touch()",
        "__import__('shutil').copy('/etc/hostname', '{}')",
    ],
)
def test_nothing_is_written_and_the_attempt_shows(sandbox, tmp_path, code):
    tmp_path.chmod(0o777)
    target = tmp_path / "X"
    verdict = only(sandbox, code.format(target), swallow=True)
    assert not target.exists()
    assert verdict.state is ERROR and "forbidden" in verdict.message


@pytest.mark.parametrize(
    "code",
    [
        "os.fork()",
        "__import__('socket').socket()",
        "os.kill(os.getppid(), 9)",
        "os.killpg(0, 9)",
        "__import__('ctypes').CDLL(None)",
        "os.remove('/etc/hostname')",
    ],
)
def test_processes_sockets_and_signals_are_refused_and_the_attempt_shows(sandbox, code):
    verdict = only(sandbox, code, swallow=True)
    assert verdict.state is ERROR and "forbidden" in verdict.message


# Starts a program without raising an audit event.
FORK_EXEC = (
    "__import__('_posixsubprocess').fork_exec([b'true'], [b'/bin/true'], True, (), None, None, "
    "-1, -1, -1, -1, -1, -1, *os.pipe(), False, False, -1, None, None, None, -1, None, False)"
)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the private call's arguments are those of Python 3.11")
def test_the_kernel_refuses_a_process_where_the_hook_sees_none(sandbox):
    assert eval(FORK_EXEC, {"os": os}) > 0  # outside, the same call starts it
    verdict = only(sandbox, FORK_EXEC)
    assert verdict.state is ERROR and "BlockingIOError" in verdict.message  # EAGAIN: the process limit


@pytest.mark.parametrize("code", ["__import__('_thread').start_new_thread(print, ())", "os.setuid(0)"])
def test_the_kernel_refuses_threads_and_another_user(sandbox, code):
    assert only(sandbox, code).state is ERROR


def test_memory_is_bounded(sandbox):
    verdict = only(sandbox, "len(bytearray(2 * 10**9))")
    assert verdict.state is ERROR and "MemoryError" in verdict.message


def test_one_item_cannot_change_the_next(sandbox):
    poison = "sys.modules['lit_reason_scorer'].__dict__.update(score=lambda p: 1.0) or CALLS.extend('abc') or 0"
    poisoned, clean = run(sandbox, poison, "len(CALLS)")
    assert (poisoned.value, clean.value) == (0, 1)


def test_the_environment_is_bare(scorer, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with Sandbox(scorer, isolation="limits") as pool:
        secret, folder = run(pool, "'SECRET_TOKEN' in os.environ", "len(os.listdir('.'))")
    assert (secret.value, folder.value) == (0, 0)


def test_a_killed_worker_is_replaced(sandbox):
    run(sandbox, "0")
    os.kill(sandbox._idle[0]._process.pid, signal.SIGKILL)
    assert run(sandbox, "0.5")[0].value == 0.5


def test_a_worker_killed_while_scoring_costs_one_item(scorer):
    with Sandbox(scorer, timeout_s=1.0, isolation="limits") as pool:
        run(pool, "0")
        worker = pool._idle[0]
        threading.Timer(0.2, os.kill, (worker._process.pid, signal.SIGKILL)).start()
        verdicts = run(pool, "0.5", "time.sleep(0.5) or 1", "0.25")
    assert [v.value for v in verdicts] == [0.5, 1, 0.25]  # the chunk is tried again on a new worker


def test_a_stopped_worker_does_not_hang_the_trainer(scorer, monkeypatch):
    monkeypatch.setattr("lit_reason.sandbox.process.GRACE_S", 0.5)
    with Sandbox(scorer, timeout_s=0.3, isolation="limits") as pool:
        run(pool, "0")
        os.kill(pool._idle[0]._process.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert run(pool, "0.5")[0].value == 0.5  # on a new worker
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("act, state", [("os._exit(1)", ERROR), ("time.sleep(60)", TIMEOUT)])
def test_what_brings_its_worker_down_twice_is_charged_alone(tmp_path, monkeypatch, act, state):
    monkeypatch.setattr("lit_reason.sandbox.process.GRACE_S", 0.2)
    source = textwrap.dedent(SCORER).replace("def prepare(payload): pass", "def prepare(payload): eval(payload['act'])")
    (tmp_path / "scorer.py").write_text(source)
    with Sandbox(tmp_path / "scorer.py", timeout_s=0.1, isolation="limits") as pool:
        acts = ["0", act, "0"]
        verdicts = pool.score([{"code": "0.5", "act": act} for act in acts])
    assert [verdict.state for verdict in verdicts] == [OK, state, OK]


def test_a_payload_that_is_no_json_is_an_error_of_its_own(sandbox):
    good, bad = sandbox.score([{"code": "1"}, {"code": object()}])
    assert good.value == 1 and bad.state is ERROR and "JSON" in bad.message


def test_a_scorer_that_cannot_load_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_at_all")
    with pytest.raises(RewardError, match=r"broken\.py did not start.*no_such_module_at_all"):
        Sandbox(tmp_path / "broken.py", isolation="limits").score([{}])


def test_copies_share_nothing(sandbox):
    run(sandbox, "0")
    for twin in (copy.deepcopy(sandbox), pickle.loads(pickle.dumps(sandbox))):
        with twin:
            assert twin._idle == [] and run(twin, "0.5")[0].value == 0.5


def test_bad_settings(scorer):
    with pytest.raises(ConfigError, match="timeout_s"):
        Sandbox(scorer, timeout_s=0)
    with pytest.raises(ConfigError, match="did you mean 'limits'"):
        Sandbox(scorer, isolation="limit").score([{"code": "1"}])


def run_script(body, scorer, tmp_path):
    """Run a Python script that prints process ids; (exit code, pids)."""
    head = f"""
        import os, threading, time
        from pathlib import Path
        from lit_reason.sandbox import Sandbox
        pool = Sandbox({str(scorer)!r}, timeout_s=30, isolation="limits")
        pool.score([{{"code": "1"}}])
        worker = pool._idle[0]._process.pid
    """
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    return ended.returncode, [int(pid) for pid in ended.stdout.split()]


def all_gone(pids, within_s=1.0):
    deadline = time.monotonic() + within_s
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(_alive, pids))


def test_at_exit_neither_process_nor_folder_is_left(scorer, tmp_path):
    code, pids = run_script("print(worker)", scorer, tmp_path)
    assert code == 0 and len(pids) == 1 and all_gone(pids)
    assert list(tmp_path.iterdir()) == []


def test_no_orphan_survives_a_killed_trainer(scorer, tmp_path):
    # While an item is being scored; a forked copy of the trainer, like a data worker, holds the pipes open.
    body = """
        threading.Thread(target=pool.score, args=([{"code": "time.sleep(30)"}],), daemon=True).start()
        time.sleep(0.3)
        copy = os.fork()
        if copy == 0:
            os.closerange(1, 3)
            time.sleep(30)
        children = Path(f"/proc/{worker}/task/{worker}/children").read_text()
        print(copy, worker, children, flush=True)
        os.kill(os.getpid(), 9)
    """
    code, (copy_pid, *pids) = run_script(body, scorer, tmp_path)
    try:
        assert code == -signal.SIGKILL and len(pids) == 2 and all_gone(pids)
    finally:
        os.kill(copy_pid, signal.SIGKILL)


def _alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
