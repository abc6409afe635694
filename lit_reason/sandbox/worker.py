"""The worker: a script that the pool runs as `python -I worker.py`, never imported by the trainer.

    stdin  one JSON line of settings, then one line per request   {"nonce", "timeout_s", "payloads": [...]}
    stdout {"ready": true} or {"error"}, then one line per reply  {"nonce", "verdicts": [[state, value, message], ...]}

It loads the scorer once and never evaluates model text itself: payloads are scored in forked children, so a crash, a
hang or a changed module ends with its child. A child scores one payload, or a run of those that the scorer's
`shareable` says cannot change the process (a fork costs ten times a score). Verdicts are lines on the child's own pipe
that must begin with the request's nonce and the item's number: neither printing nor an exit code can stand for one.
"""

from __future__ import annotations

import binascii
import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import select
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NoReturn

_REPLY_BYTES = 4096
_TEXT_BYTES = 2900  # 3868 in base 64: fits one reply with its nonce and number
Verdict = tuple[str, float | None, str]  # state, value, message; of a text: "TEXT", None, text
Fds = tuple[int, int]  # requests, replies


def load_module(path: str, name: str) -> ModuleType:
    """Import the file at `path` as `name`, without its package (whose `__init__` may be heavy)."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_child(score, payloads: list[dict], nonce: str, fd: int, lock_down, texts: bool = False) -> NoReturn:
    """Score in this process and leave. Locals hold all that is needed after: scored code can rebind globals."""
    write, leave, to_float, is_finite, to_text, kind = os.write, os._exit, float, math.isfinite, repr, type
    failure, limit, text, most, pack = BaseException, _REPLY_BYTES, str, _TEXT_BYTES, binascii.b2a_base64
    refused = lock_down()
    forget, is_dirty = refused.clear, refused.__len__
    for number, payload in enumerate(payloads):
        try:
            value = score(payload)
            if texts and kind(value) is text:
                reply = "~ " + pack(value.encode("utf-8", "replace")[:most], newline=False).decode()
            else:
                value = to_float(value)
                reply = "= " + to_text(value) if is_finite(value) else "! the score is not finite: " + to_text(value)
        except failure as error:
            reply = "! " + kind(error).__name__ + ": " + " ".join(f"{error}".split())[:300]
        if is_dirty():  # scorers swallow exceptions: a refused operation must show all the same
            reply = "! forbidden: " + refused[0]
            forget()
        line = f"{nonce} {number} {reply}".encode("ascii", "replace")[: limit - 1]
        write(fd, line + b"\n")
    leave(0)


def read_line(fd: int, requests_fd: int, buffer: bytearray, deadline: float) -> bytes | None:
    """The child's next line, or what it wrote before closing; None at the deadline. Leaves when the trainer is gone."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.register(requests_fd, 0)  # hang-up is always reported
    while b"\n" not in buffer and len(buffer) <= 2 * _REPLY_BYTES:
        left = deadline - time.monotonic()
        events = dict(poller.poll(left * 1000)) if left > 0 else {}
        if requests_fd in events:
            os._exit(0)
        if not events:
            return None
        chunk = os.read(fd, _REPLY_BYTES)
        if not chunk:
            break
        buffer += chunk
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return line


def judge(line: bytes | None, mark: str, status: int | None, timeout_s: float) -> Verdict:
    """The verdict in a child's line that begins with `mark`; its exit status only ever explains a failure."""
    text = (line or b"").decode("ascii", "replace")
    if text.startswith(mark + "= "):
        return "OK", float(text[len(mark) + 2 :]), ""
    if text.startswith(mark + "~ "):
        return "TEXT", None, binascii.a2b_base64(text[len(mark) + 2 :]).decode("utf-8", "ignore")
    if text.startswith(mark + "! "):
        return "ERROR", None, text[len(mark) + 2 :]
    if line is None or status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "TIMEOUT", None, f"no verdict within {timeout_s} s"
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return "ERROR", None, f"the scorer {how} and gave no verdict of its own"


def score_run(scorer: ModuleType, payloads: list[dict], request: dict, lock_down, fds: Fds) -> list[Verdict]:
    """Score payloads in one child; stops after the first that brings the child down, so at least one verdict."""
    nonce, timeout_s = request["nonce"], request["timeout_s"]
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for fd in (read_fd, *fds):
            os.close(fd)
        run_child(scorer.score, payloads, nonce, write_fd, lock_down, getattr(scorer, "TEXTS", False))
    os.close(write_fd)
    buffer, verdicts, status = bytearray(), [], None
    for number in range(len(payloads)):
        mark = f"{nonce} {number} "
        line = read_line(read_fd, fds[0], buffer, time.monotonic() + timeout_s)
        answered = line is not None and line.startswith(mark.encode())
        if not answered:
            status = end_child(pid, ended=line == b"")
        verdicts.append(judge(line, mark, status, timeout_s))
        if not answered:
            break
    os.close(read_fd)
    if status is None:
        end_child(pid)
    return verdicts


def end_child(pid: int, ended: bool = False) -> int:
    """Kill the child and whatever shares its session, and reap it; its wait status."""
    if ended:  # it closed its pipe: give its own exit a moment to show
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def score_request(scorer: ModuleType, request: dict, lock_down, fds: Fds) -> list[Verdict]:
    """One verdict per payload of the request, in order."""
    shareable = getattr(scorer, "shareable", lambda payload: False)
    waiting: list[dict] = request["payloads"]
    verdicts: list[Verdict] = []
    while waiting:
        try:
            scorer.prepare(waiting[0])
        except Exception as error:
            verdicts.append(("ERROR", None, f"{type(error).__name__}: {error}"[:300]))
            waiting = waiting[1:]
            continue
        same_task = itertools.takewhile(lambda p: shareable(p) and scorer.is_prepared(p), waiting)
        run = list(same_task) or waiting[:1]
        gc.freeze()  # a child's collector would touch, and so copy, every inherited page
        verdicts += (scored := score_run(scorer, run, request, lock_down, fds))
        waiting = waiting[len(scored) :]
    return verdicts


def take_pipes() -> Fds:
    """Move stdin and stdout to private descriptors and leave /dev/null in their place, so that prints go nowhere."""
    private = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    return private


def main() -> None:
    private_fds = take_pipes()
    requests = os.fdopen(private_fds[0], "rb", closefd=False)

    replies = os.fdopen(private_fds[1], "wb", buffering=0, closefd=False)

    def send(message: dict) -> None:
        replies.write(json.dumps(message).encode() + b"\n")

    settings = json.loads(requests.readline())
    sys.path[:] = settings["path"]
    try:
        confine = load_module(str(Path(__file__).with_name("confine.py")), "lit_reason_confine")
        library = confine.libc()
        confine.die_with_parent(library)
        scorer = load_module(settings["scorer"], "lit_reason_scorer")
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        return
    readable = getattr(scorer, "READABLE", None)
    send({"ready": True})

    for line in requests:
        request = json.loads(line)

        def lock_down(cpu_s: int = math.ceil(request["timeout_s"] * len(request["payloads"])) + 1) -> list[str]:
            return confine.confine(library, settings["memory_bytes"], cpu_s, readable)

        verdicts = score_request(scorer, request, lock_down, private_fds)
        send({"nonce": request["nonce"], "verdicts": verdicts})


if __name__ == "__main__":
    main()
