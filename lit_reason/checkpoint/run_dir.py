"""One run, one directory, one writer.

runs/demo/
  config.yaml      the resolved configuration of the newest start (earlier ones: config.1.yaml, ...)
  checkpoints/     *.ckpt with their manifests
  metrics/         CSV or JSONL, one row per optimizer step
  completions/     every completion of every step
  samples/         a few of them, for reading
  .lock            held while a process writes here
  old-1/           what was here before a start with resume=never
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_reason.checkpoint.atomic import write_bytes
from lit_reason.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

FOLDERS = ("checkpoints", "metrics", "completions", "samples")
# A change under one of these keys makes the saved weights unusable.
LOCKED = ("model", "tokenizer", "data.tokenizer")
NAMED = 8  # changed keys that a refusal names


class RunDir:
    """A run's directory: a stable layout, a lock, and the configuration it was started with.

    Example::

        with RunDir("runs/demo") as run:
            run.start(config, resume="auto")
            trainer.fit(module, ckpt_path=find_resume(run.path, "auto"))

    Only rank 0 locks and writes; the other ranks use the paths.

    Args:
        path: the directory; created with its folders.
        locked: dotted prefixes of keys that a resumed run must not change.
    """

    def __init__(self, path: str | Path, locked: Sequence[str] = LOCKED) -> None:
        self.path = Path(path).absolute()
        self.checkpoints, self.metrics, self.completions, self.samples = (self.path / name for name in FOLDERS)
        self.config_file = self.path / "config.yaml"
        self._locked_keys = tuple(locked)
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunDir:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Create the layout and take the lock; ConfigError when another process writes here, or nobody can."""
        if _rank() or self._lock is not None:
            return
        try:
            with _explain(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = _take_lock(self.path / ".lock")
                for name in FOLDERS:
                    (self.path / name).mkdir(exist_ok=True)
                # Left by a save that was killed; the lock says that nobody is writing them now.
                for leftover in self.checkpoints.glob(".*.tmp"):
                    leftover.unlink()
        except ConfigError:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back; the end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def start(
        self,
        config: Mapping[str, Any],
        resume: str | Path = "auto",
        fill: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        """Record the configuration of this start.

        With `resume="never"` everything that a former run left is moved to `old-N/`, so that its checkpoints can
        never be taken for this run's. Otherwise the configuration is compared with the saved one.

        Args:
            config: resolved, plain values (`OmegaConf.to_container(cfg, resolve=True)`).
            fill: adds to the saved configuration the defaults that `config` spells out, before the two are compared.

        Raises:
            CheckpointError: checkpoints exist and a key under `locked` differs, or cannot be compared.
            ConfigError: the directory cannot be written.
        """
        if _rank():
            return
        with _explain(self.path):
            if resume == "never":
                self._set_aside()
            data = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode()
            if self.config_file.exists():
                before = self.config_file.read_bytes()
                saved = self._parse(before)
                self._compare(config, fill(saved) if fill is not None else saved)
                if data != before:  # a copy, not a rename: at no moment is there no config.yaml to compare with
                    write_bytes(_free_name(self.path, "config.{}.yaml"), before)
            write_bytes(self.config_file, data)

    def _parse(self, data: bytes) -> Mapping[str, Any]:
        """The saved configuration; empty when it is damaged and no checkpoint depends on it."""
        try:
            saved = yaml.safe_load(data)
            reason = f"it holds {type(saved).__name__}, not a mapping"
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            saved, reason = None, str(error).splitlines()[0]
        if isinstance(saved, Mapping):
            return saved
        if any(self.checkpoints.glob("*.ckpt")):
            raise CheckpointError(
                f"{self.config_file} is damaged ({reason}), so nobody can tell whether the checkpoints beside it fit. "
                "Put it back from a copy, delete it to continue without this check, or type resume=never"
            )
        return {}

    def _compare(self, config: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        now, before = dict(flatten(config)), dict(flatten(saved))
        keys = sorted(k for k in now.keys() | before.keys() if now.get(k, "(absent)") != before.get(k, "(absent)"))
        changes = {k: f"{k}: got {now.get(k, '(absent)')!r}, saved {before.get(k, '(absent)')!r}" for k in keys}
        fatal = [text for k, text in changes.items() if any(k == p or k.startswith(p + ".") for p in self._locked_keys)]
        if fatal and any(self.checkpoints.glob("*.ckpt")):
            more = f"; and {len(fatal) - NAMED} more" if len(fatal) > NAMED else ""
            raise CheckpointError(
                f"the checkpoints in {self.path} do not fit this configuration: {'; '.join(fatal[:NAMED])}{more}. Set "
                "the saved values, or type run_dir=ANOTHER, or resume=never to set this run aside and start again"
            )
        if changes:
            log.warning("configuration changed since this run was started: %s", "; ".join(changes.values()))

    def _set_aside(self) -> None:
        """Move what a former run left to `old-N/`; nothing is deleted."""
        left = [p for p in self.path.iterdir() if not p.name.startswith((".", "old-"))]
        left = [p for p in left if not p.is_dir() or any(p.iterdir())]
        if not left:
            return
        target = _free_name(self.path, "old-{}")
        target.mkdir()
        for path in left:
            path.rename(target / path.name)
        for name in FOLDERS:
            (self.path / name).mkdir(exist_ok=True)
        log.warning("resume=never: the former run was moved to %s", target)


def _rank() -> int:
    """This process's global rank; 0 when nothing is distributed."""
    return getattr(rank_zero_only, "rank", None) or 0


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves: `{"model": {"width": 64}}` gives `("model.width", 64)`."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, name + ".")
        else:
            yield name, list(value) if isinstance(value, tuple) else value


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    """A folder that cannot be written is a setting to change, not a bug to trace."""
    try:
        yield
    except OSError as error:
        at = f": {error.filename}" if error.filename else ""
        raise ConfigError(
            f"run_dir={path} cannot be used ({error.strerror}{at}). Mend that, or type run_dir=ANOTHER, a folder that "
            "you may write to, with space left"
        ) from error


def _free_name(folder: Path, pattern: str) -> Path:
    number = 1
    while (folder / pattern.format(number)).exists():
        number += 1
    return folder / pattern.format(number)


def _take_lock(path: Path) -> IO[str]:
    """An open, locked file; the lock goes with the process, however it ends."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open as long as the lock is
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            log.warning("%s: this file system has no locks (%s); do not start two runs here", path, error)
            return file
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"run_dir={path.parent} is in use by {holder}. Stop it, or type run_dir=ANOTHER") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
