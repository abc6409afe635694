"""How the worker is started: command line, environment, and the outer wall (bubblewrap) when there is one."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lit_reason.errors import ConfigError, RewardError, nearest

log = logging.getLogger(__name__)
WORKER = Path(__file__).with_name("worker.py")
ISOLATIONS = ("auto", "bwrap", "limits")
# A read-only view of the file system, no network, own process, user and IPC namespaces.
_WALL = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", "--die-with-parent"]


@functools.lru_cache(maxsize=4)
def bubblewrap(path: str | None) -> str:
    """`""` when the bwrap at `path` works here, else the reason why not (also logged, once)."""
    reason = ""
    if path is None:
        reason = "bubblewrap (bwrap) is not installed"
    else:
        tried = subprocess.run([path, *_WALL, "true"], capture_output=True, text=True, timeout=30, check=False)
        if tried.returncode != 0:
            reason = f"bubblewrap does not work here ({tried.stderr.strip()[:200]})"
    if reason:
        log.warning("%s: scorers run under resource limits and an audit hook only", reason)
    return reason


def check_isolation(isolation: str) -> None:
    if isolation not in ISOLATIONS:
        raise ConfigError(f"isolation={isolation!r} is unknown: {nearest(isolation, ISOLATIONS)}")


def command(isolation: str, folder: str) -> list[str]:
    """The worker's command line, to run in `folder`; raises when `isolation="bwrap"` cannot be had."""
    python = [sys.executable, "-I", "-B", str(WORKER)]
    if isolation == "limits":
        return python
    path = shutil.which("bwrap")
    reason = bubblewrap(path)
    if reason and isolation == "bwrap":
        raise RewardError(f"isolation='bwrap', but {reason}: install bubblewrap, or type isolation=auto")
    if reason or path is None:
        return python
    return [path, *_WALL, "--tmpfs", folder, "--chdir", folder, "--", *python]  # some imports want a cache folder


def environment(folder: str) -> dict[str, str]:
    """A bare environment: no tokens, no proxies, one thread."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, **threads, **kept}


def module_path() -> list[str]:
    """The absolute folders of this process's `sys.path`; the empty entry (current folder) is left out."""
    return [entry for entry in sys.path if entry and os.path.isabs(entry)]
