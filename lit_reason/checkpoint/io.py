"""Crash-safe checkpoints for Lightning.

Lightning 2.6.6 writes under /tmp and moves the file onto its final name; across file systems that move is a copy, and
a kill in its middle leaves an unreadable checkpoint. Here the final name only ever holds a whole, fsynced file, and a
manifest (see manifest.py) says which one.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from lit_reason.checkpoint.atomic import OUT_OF_SPACE, free_space, replace_file, temporary_file
from lit_reason.checkpoint.manifest import Record, manifest_path, read_manifest, verify, write_manifest
from lit_reason.checkpoint.plain import plain_checkpoint
from lit_reason.errors import CheckpointError

FROM_LIGHTNING = {"state_dict", "global_step", "pytorch-lightning_version"}


class SafeCheckpointIO(CheckpointIO):
    """Saves whole checkpoints or none, and loads only what is whole and free of code.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lit_reason.checkpoint import SafeCheckpointIO
        >>> trainer = Trainer(plugins=[SafeCheckpointIO()])

    YAML::

        trainer:
          plugins:
            - _target_: lit_reason.checkpoint.SafeCheckpointIO
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path` so that a kill at any instant leaves the old file or the new one, verified.

        Raises:
            CheckpointError: an entry is not a tensor or plain value, or the file system refused the write; the
                temporary file is removed and whatever was saved before is untouched.
        """
        if storage_options is not None:
            raise CheckpointError(f"storage_options={storage_options!r}: SafeCheckpointIO takes none; leave it out")
        path = Path(path)
        plain = plain_checkpoint(checkpoint)
        with _explain_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary_file(path, lambda writer: torch.save(plain, cast(IO[bytes], writer))) as (temporary, writer):
                step = int(plain.get("global_step", 0))
                record = Record(writer.hexdigest(), writer.size, step, time.time())
                previous = _previous(path)
                if previous:
                    write_manifest(path, record, previous)
                replace_file(temporary, path)
                write_manifest(path, record)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint after checking it against its manifest; always with `weights_only=True`.

        A file without a manifest (saved by another CheckpointIO) is read as it is.

        Raises:
            CheckpointError: `weights_only=False` was asked for, or the file is missing, truncated, damaged, or
                holds objects.
        """
        if weights_only is False:
            raise CheckpointError(
                f"weights_only=False for {path}: a checkpoint that holds objects can run code when it is read, and "
                "SafeCheckpointIO never does that. Leave weights_only out"
            )
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist. Type resume=auto to continue from the newest checkpoint")
        # A link such as ModelCheckpoint(save_last="link") makes has no manifest of its own.
        target = path.resolve()
        hint = "Type resume=auto to continue from the newest checkpoint that is whole"
        try:
            record = verify(target)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {hint}") from error
        try:
            loaded = torch.load(target, map_location=map_location, weights_only=True)
        # torch and its unpickler raise many unrelated types for a broken file; none of them names the file.
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {reason}. {hint}") from error
        if record is None and not (isinstance(loaded, dict) and loaded.keys() >= FROM_LIGHTNING):
            raise CheckpointError(
                f"{path} is no checkpoint of a training (one holds {', '.join(sorted(FROM_LIGHTNING))}). To start from "
                "the weights of a saved model type init=dir:FOLDER"
            )
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, then its manifest: a manifest without its file is not a checkpoint."""
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        manifest_path(path).unlink(missing_ok=True)


def _previous(path: Path) -> Record | None:
    """The record of the whole file that `path` holds now; None when there is none worth keeping."""
    if not path.is_file() or path.is_symlink():
        return None
    try:
        records = read_manifest(path)
    except CheckpointError:
        return None
    # With two records on disk an earlier save was killed between its renames: size tells which one is there,
    # and equal sizes need the hash.
    if len(records) > 1:
        try:
            return verify(path)
        except CheckpointError:
            return None
    return records[0] if records else None


@contextmanager
def _explain_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "Earlier checkpoints are untouched. "
        again = "and run the same command again with resume=auto"
        if error.errno not in OUT_OF_SPACE:
            raise CheckpointError(f"{path} could not be saved: {error}. {kept}Mend that {again}") from error
        if error.errno == errno.EFBIG:
            limit = "the file system, or `ulimit -f`, allows no file of this size"
            raise CheckpointError(f"{path} could not be saved: {limit}. {kept}Raise the limit {again}") from error
        raise CheckpointError(
            f"no space to save {path}: {error.strerror}, {free_space(path)} free. {kept}Free some space {again}, or "
            "keep fewer checkpoints with callbacks.checkpoint.save_top_k=1"
        ) from error
