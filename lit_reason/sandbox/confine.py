"""What a scoring child may not do. Standard library only: it is imported by the worker, outside the trainer.

Two layers that need no privileges: kernel limits (memory, CPU, no file bytes, no new processes, no core) and a Python
audit hook that refuses and records writes, processes, sockets, signals, foreign calls and frame walking. A hook cannot
be removed by Python code, but native code could step around it: bubblewrap, when installed, is the outer wall.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable

NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _SIGKILL = 1, 4, 8, 9
_CAPABILITY_VERSION_3, _CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2

_REFUSED_PREFIXES = ("ctypes.", "fcntl.", "gc.", "mmap.", "os.", "pty.", "resource.", "shutil.", "signal.", "socket.")
_REFUSED_PREFIXES += ("sqlite3.", "subprocess.", "tempfile.", "urllib.", "webbrowser.")
_REFUSED_EVENTS = frozenset(
    ["_thread.start_new_thread", "code.__new__", "sys._current_exceptions", "sys._current_frames"]
    + ["sys._getframe", "sys.addaudithook", "sys.setprofile", "sys.settrace", "sys.unraisablehook"]
)
# Reading a folder is how Python imports a module that a scorer loads late.
_ALLOWED_EVENTS = frozenset(["os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.listxattr", "os.getxattr"])
_FRAME_ATTRIBUTES = frozenset(["tb_frame", "gi_frame", "cr_frame", "ag_frame"])
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def libc() -> ctypes.CDLL | None:
    """The C library for `prctl`, None where the kernel has no such call."""
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(library: ctypes.CDLL | None) -> None:
    """The kernel kills this process when its parent dies, so that no orphan survives a SIGKILL of the trainer."""
    if library is not None:
        library.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def limit(memory_bytes: int, cpu_s: int) -> None:
    """Resource limits of one child: address space, CPU seconds, no file bytes, no core, no further process."""
    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": 64, "CPU": cpu_s, "AS": memory_bytes}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)  # a limit cannot be raised
        resource.setrlimit(kind, (value, value))


def drop_root(library: ctypes.CDLL | None) -> None:
    """Become `nobody` when root, whom no process limit holds; a container without that right stays as it is.

    Reading stays allowed (CAP_DAC_READ_SEARCH): a scorer's late import must not fail, unseen, on a private folder.
    """
    if os.geteuid() != 0:
        return
    try:
        if library is not None:
            library.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    except OSError:
        return
    if library is not None:
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)(_CAP_DAC_READ_SEARCH, _CAP_DAC_READ_SEARCH, 0, 0, 0, 0)  # effective, permitted
        if library.capset(header, sets) != 0:
            library.capset(header, (ctypes.c_uint32 * 6)())


def audit_hook(readable: tuple[str, ...] | None = None) -> tuple[Callable[[str, tuple], None], list[str]]:
    """A hook for `sys.addaudithook`, and the list in which it records what it refused.

    `readable`: the only folders whose files may be opened; None allows all.
    Everything it needs lives in its closure: scored code can rebind the globals of every module.
    """
    refused: list[str] = []
    record, is_text, is_number, starts, contains = refused.append, str, int, str.startswith, str.__contains__
    prefixes, events, allowed = _REFUSED_PREFIXES, _REFUSED_EVENTS, _ALLOWED_EVENTS
    frames, write_flags, check, error = _FRAME_ATTRIBUTES, _WRITE_FLAGS, isinstance, PermissionError
    any_of = any

    def writes(mode: object, flags: object) -> bool:
        if check(mode, is_text) and any_of(contains(mode, letter) for letter in "wax+"):
            return True
        return check(flags, is_number) and flags & write_flags != 0

    def out_of_bounds(path: object) -> bool:
        if readable is None or check(path, is_number):  # a number is a file that is open already
            return False
        return not check(path, is_text) or not starts(path, readable) or contains(path, "/..")

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            bad = writes(args[1], args[2]) or out_of_bounds(args[0])
        elif event == "object.__getattr__":
            bad = args[1] in frames
        else:
            bad = (event in events or starts(event, prefixes)) and event not in allowed
        if bad:
            record(event)
            raise error(event + " is forbidden to scored text")

    return hook, refused


def confine(
    library: ctypes.CDLL | None, memory_bytes: int, cpu_s: int, readable: tuple[str, ...] | None = None
) -> list[str]:
    """Lock this process down for good; returns the list that will hold the refused events."""
    limit(memory_bytes, cpu_s)
    drop_root(library)
    die_with_parent(library)  # after drop_root: a change of user clears it
    if library is not None:
        library.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    hook, refused = audit_hook(readable)
    sys.addaudithook(hook)
    return refused
