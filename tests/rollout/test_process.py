"""An engine in a process of its own, on small hosts that do what a test needs: no vLLM."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_reason.errors import EngineDiedError, EngineStalledError, RolloutError
from lit_reason.rollout import process as process_module
from lit_reason.rollout.process import EngineProcess, buckets
from lit_reason.rollout.worker import Generated, check_versions

HERE = str(Path(__file__).parent)
HOST = "hosts:Host"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The child finds the hosts as the parent does."""
    sys.path.insert(0, HERE)
    yield
    sys.path.remove(HERE)


@pytest.fixture(scope="module")
def shared():
    """For tests that leave it alive."""
    process = EngineProcess(HOST)
    process.start({"greeting": "hi"}, start_s=120)
    yield process
    process.close()


@pytest.fixture
def own():
    process = EngineProcess(HOST)
    process.start({}, start_s=120)
    yield process
    process.close()


def runs(pid: int) -> bool:
    """Exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(*pids: int, within: float = 10) -> bool:
    until = time.monotonic() + within
    while any(map(runs, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(runs, pids))


def test_calls_are_answered_and_progress_is_heard(shared):
    heard = []
    assert shared.call("greet", "you", silence_s=30) == "hi you"
    found = shared.call("generate", [((1, 2), 5, 9), ((3,), 6, 9)], None, silence_s=30, heard=heard.append)
    assert [(one.token_ids, one.version) for one in found] == [((5, 5, 5), -1), ((6, 6, 6), -1)]
    assert [(p.done, p.total) for p in heard] == [(0, 2), (0, 2), (2, 2)]


def test_a_host_that_fails_says_where_and_serves_on(shared):
    with pytest.raises(RolloutError, match=r"(?s)Host failed to fail: KeyError: 'spoon'.*hosts\.py.*raise KeyError"):
        shared.call("fail", silence_s=30)
    with pytest.raises(RolloutError, match="no attribute 'no_such_call'"):
        shared.call("no_such_call", silence_s=30)
    with pytest.raises(RolloutError, match=r"(?i)pickle|local object"):
        shared.call("unpicklable", silence_s=30)
    assert shared.call("greet", "again", silence_s=30) == "hi again"


TENSORS = {
    **{str(dtype): torch.arange(-3, 4).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
    "float64": torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "int64": torch.tensor([2**62, -(2**62)]),
    "uint8": torch.arange(256).to(torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "float8": torch.linspace(-4, 4, 9).to(torch.float8_e4m3fn),
    "0-d": torch.tensor(1.5),
    "empty": torch.empty(0, 7),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "strided": torch.arange(20.0)[::3],
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "trained": torch.nn.Parameter(torch.ones(2, 2)),
}


@pytest.mark.parametrize("bucket", [64 << 20, 100])  # all at once; most of them larger than a bucket
def test_tensors_arrive_bit_for_bit(shared, monkeypatch, bucket):
    monkeypatch.setattr(process_module, "BUCKET", bucket)
    shared.send("load", 7, tensors=TENSORS.items(), silence_s=30)
    said = shared.call("loaded", silence_s=30)
    assert [name for name, *_ in said] == list(TENSORS)
    for name, dtype, shape, raw in said:
        tensor = TENSORS[name].detach()
        assert (dtype, shape) == (str(tensor.dtype), tuple(tensor.shape)), name
        expected = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw == expected, name
    shared.send("load", 8, tensors=[], silence_s=30)
    assert shared.call("loaded", silence_s=30) == []


def test_buckets_keep_order_and_limit():
    sizes = [3, 3, 9, 1, 1, 1, 8, 1]
    groups = list(buckets(((str(i), torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate(sizes)), 4))
    assert [name for group in groups for name, _ in group] == [str(i) for i in range(len(sizes))]
    assert [[t.nbytes for _, t in group] for group in groups] == [[3], [3], [9], [1, 1, 1], [8], [1]]


def test_a_host_that_takes_only_a_part_is_refused(own):
    own.call("take_only", 1, silence_s=30)
    names = [(f"w{i}", torch.ones(4)) for i in range(3)]
    with pytest.raises(RolloutError, match="took only a part of the weights: w1"):
        own.send("load", 1, tensors=names, silence_s=30)


def test_tensors_of_a_push_that_the_host_gave_up_are_not_the_next_ones(own):
    own.call("take_only", 0, silence_s=30)  # raises before it took any
    with pytest.raises(RolloutError, match="no weights, thanks"):
        own.send("load", 1, tensors=[("old", torch.zeros(4))], silence_s=30)
    own.call("take_only", None, silence_s=30)
    own.send("load", 2, tensors=[("new", torch.ones(4))], silence_s=30)
    assert [name for name, *_ in own.call("loaded", silence_s=30)] == ["new"]


def test_weights_come_between_two_steps_and_completions_say_so(own):
    """Pushed by the listener at the first step's message, so that it is known when."""
    pushed = []

    def push(progress):
        if not pushed:
            pushed.append(threading.Thread(target=own.send, args=("load", 4), kwargs={"tensors": [], "silence_s": 30}))
            pushed[0].start()

    found = own.call("generate", [((1,), 5, 9)], None, 3, 0.3, silence_s=30, heard=push)
    pushed[0].join()
    assert found[0].version == -1 and found[0].switches in (((1, 4),), ((2, 4),))


def test_a_completion_that_hides_a_change_of_weights_is_refused(own):
    own.call("hide_switches", silence_s=30)
    pushed = []

    def push(progress):
        if not pushed:
            pushed.append(threading.Thread(target=own.send, args=("load", 4), kwargs={"tensors": [], "silence_s": 30}))
            pushed[0].start()

    with pytest.raises(RolloutError, match="version 4 came while 1 completions were being generated, and only 0 say"):
        own.call("generate", [((1,), 5, 9)], None, 3, 0.3, silence_s=30, heard=push)
    pushed[0].join()


def test_versions_are_counted_per_change():
    one = Generated((1, 2, 3), (0.0,) * 3, True, 0)
    switched = replace(one, switches=((1, 1),))
    check_versions([one, switched], [(1, 1)])
    check_versions([replace(one, version=1), switched], [(1, 2)])
    check_versions([one, one], [(1, 0)])  # both were finished
    with pytest.raises(RuntimeError, match=r"version 1 came while 2 .* only 1 say"):
        check_versions([one, switched], [(1, 2)])
    with pytest.raises(RuntimeError, match="version 2"):
        check_versions([switched], [(1, 1), (2, 1)])


def test_a_stall_is_named_with_stacks_within_the_deadline(own):
    began = time.monotonic()
    with pytest.raises(EngineStalledError) as caught:
        own.call("hang_here", silence_s=1.0)
    assert 1.0 <= time.monotonic() - began < 11
    assert "no sign of life for 1 s while asked to hang_here" in str(caught.value)
    assert "in hang_here" in str(caught.value) and "hosts.py" in str(caught.value)  # of faulthandler
    assert not own.alive


def test_a_stopped_process_is_named(own):
    pid = own.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineStalledError, match=r"in state T .*It was stopped \(SIGSTOP\)"):
        own.call("greet", "you", silence_s=1.0)
    assert gone(pid)


def test_a_large_request_to_a_stopped_process_does_not_wait_for_ever(own):
    """The pipe holds some 200 kB: a write of 50 MB to a process that does not read would never return."""
    os.kill(own.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineStalledError):
        own.call("greet", b"x" * 50_000_000, silence_s=1.0)
    assert time.monotonic() - began < 11


def test_a_signal_of_life_resets_the_deadline(shared):
    found = shared.call("generate", [((1,), 5, 9)], None, 6, 0.5, silence_s=2.0)  # 3 s in all
    assert len(found[0].token_ids) == 6


@pytest.mark.parametrize("how", ["killed", "exits", "raises at start"])
def test_an_end_is_named_with_its_last_words(how, own):
    if how == "killed":
        threading.Timer(0.3, os.kill, (own.pid, signal.SIGKILL)).start()
        with pytest.raises(EngineDiedError, match=r"killed by signal 9 \(SIGKILL\) while asked to hang_here.*memory"):
            own.call("hang_here", silence_s=60)
    elif how == "exits":
        with pytest.raises(EngineDiedError, match=r"(?s)ended with code 3 while asked to leave.*so long and thanks"):
            own.call("leave", "so long and thanks", silence_s=60)
        with pytest.raises(EngineDiedError):
            own.call("greet", "you", silence_s=60)
    else:
        with pytest.raises(
            RolloutError, match=r"(?s)failed to start: TypeError.*unexpected keyword argument 'nonsense'"
        ):
            EngineProcess(HOST).start({"nonsense": 1}, start_s=120)


def test_an_end_is_seen_though_a_grandchild_holds_the_pipe(own):
    grandchild = own.call("inheriting", silence_s=30)
    began = time.monotonic()
    with pytest.raises(EngineDiedError, match="ended with code 3"):
        own.call("leave", "", silence_s=60)
    assert time.monotonic() - began < 10 and gone(grandchild)


def test_closing_frees_everyone_who_waits(own):
    errors, pid = [], own.pid

    def wait():
        try:
            own.call("hang_here", silence_s=60)
        except EngineDiedError as error:
            errors.append(str(error))

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.5)
    own.close()
    own.close()
    for thread in waiting:
        thread.join(timeout=10)
    assert len(errors) == 3 and all("was closed while asked to" in error for error in errors)
    assert gone(pid)


def test_nothing_is_left_open(shared):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    process = EngineProcess(HOST)
    process.start({}, start_s=120)
    process.send("load", 1, tensors=[("w", torch.ones(5))], silence_s=30)
    log = process.log
    process.close()
    assert descriptors() == before and threading.active_count() == threads and not log.exists()


PARENT = """
import json, os, signal, sys, time
sys.path.insert(0, {here!r})
from lit_reason.rollout.process import EngineProcess
process = EngineProcess("hosts:Host")
process.start({{}}, start_s=120)
child = process.call("grandchild", silence_s=30)
fork = os.fork() if {fork} else None
if fork == 0:
    time.sleep(60)  # holds the pipe open, as a worker of a DataLoader would
    os._exit(0)
print(json.dumps([process.pid, child, fork or 0]), flush=True)
{then}
"""
ENDS = {
    "returns": "",
    "exits": "sys.exit(3)",
    "raises": "raise RuntimeError('x')",
    "Ctrl-C": "signal.raise_signal(signal.SIGINT)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "os._exit": "os._exit(0)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGKILL while generating": "import threading\n"
    "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
    "process.call('hang_here', silence_s=60)",
    "SIGKILL while it is stopped": "os.kill(process.pid, signal.SIGSTOP); os.kill(os.getpid(), signal.SIGKILL)",
    "SIGKILL with a fork left": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_outlives_the_trainer(end):
    source = PARENT.format(here=HERE, then=ENDS[end], fork="fork" in end)
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    child, grandchild, fork = json.loads(parent.stdout.readline())
    try:
        parent.wait(timeout=60)
        assert gone(child, grandchild)
    finally:
        parent.stdout.close()
        for pid in filter(None, (child, grandchild, fork)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_fork_of_the_trainer_that_exits_leaves_the_engine_alone(own):
    if (fork := os.fork()) == 0:
        own.close()
        os._exit(0)
    os.waitpid(fork, 0)
    assert own.call("greet", "you", silence_s=30) == "hello you"


def test_it_runs_on_the_cores_that_it_is_given():
    core = min(os.sched_getaffinity(0))
    process = EngineProcess(HOST, environment={"FOR_THE_CHILD": "7"}, cores=[core])
    try:
        process.start({}, start_s=120)
        assert process.call("circumstances", silence_s=30) == ({core}, "7")
        assert "FOR_THE_CHILD" not in os.environ
    finally:
        process.close()
