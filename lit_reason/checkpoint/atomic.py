"""Files that are either the old one or the new one, whatever kills the process.

    temporary file beside the target -> flush, fsync -> os.replace -> fsync of the directory

The temporary file lies in the *target's* directory: `os.replace` is atomic within one file system only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lit_reason.errors import LitReasonError

OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class HashingWriter:
    """A write-only file that keeps the sha256 and the size of what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sha.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def temporary_name(path: Path) -> Path:
    """`dir/.NAME.PID.tmp`: hidden, in the same directory, and never matched by `*.ckpt`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def fsync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_file(path: Path, write: Callable[[HashingWriter], object]) -> Iterator[tuple[Path, HashingWriter]]:
    """A finished, fsynced temporary file beside `path`; removed at the end unless it was renamed."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            writer = HashingWriter(file)
            try:
                write(writer)
            except RuntimeError as error:
                raise _hidden(error) from None
            file.flush()
            os.fsync(file.fileno())
        yield temporary, writer
    finally:
        temporary.unlink(missing_ok=True)


def _hidden(error: BaseException) -> BaseException:
    """The full disk or the Ctrl-C that `torch.save` turned into a RuntimeError about places in a zip file, if any."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (OSError, KeyboardInterrupt)):
        cause = cause.__context__
    return cause or error


def replace_file(temporary: Path, path: Path) -> None:
    """Give the finished temporary file its final name, durably."""
    os.replace(temporary, path)
    fsync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` atomically; returns its sha256."""
    with temporary_file(path, lambda writer: writer.write(data)) as (temporary, writer):
        replace_file(temporary, path)
    return writer.hexdigest()


def to_json(value: Any) -> bytes:
    """Stable, strict JSON: sorted keys, no NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> str:
    """Write `value` as JSON, atomically; returns the file's sha256."""
    return write_bytes(path, to_json(value))


@contextmanager
def recording(path: Path) -> Iterator[None]:
    """Says of a record that cannot be written what is lost (nothing but the steps since the last checkpoint)."""
    try:
        yield
    except OSError as error:
        raise LitReasonError(
            f"{path} could not be written: {error.strerror}, {free_space(path)} free. Checkpoints are untouched: mend "
            "that, and run the same command again with resume=auto"
        ) from error


def sha256_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def human(size: float) -> str:
    """Bytes in words: `human(1536)` is `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def free_space(path: Path) -> str:
    """Free space of the file system that holds `path`, which need not exist yet, in words."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return human(shutil.disk_usage(existing).free)
