"""The manifest beside a checkpoint: `last.ckpt` has `last.ckpt.manifest.json`.

    {"format": 1, "sha256": "...", "size": 12345, "global_step": 17, "saved": 1e9, "previous": null}

It is written after the checkpoint, so a checkpoint without one is a save that never finished. When a checkpoint
*replaces* another of the same name, a manifest that names both (`previous`) is written first: at every instant the
file on disk is one that its manifest knows, so that a kill between the two renames loses neither.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_reason.checkpoint.atomic import sha256_file, write_json
from lit_reason.errors import CheckpointError

FORMAT = 1
SUFFIX = ".manifest.json"


@dataclass(frozen=True, slots=True)
class Record:
    """One checkpoint's identity. `saved` is seconds since 1970 and only breaks ties between equal steps."""

    sha256: str
    size: int
    global_step: int
    saved: float


def manifest_path(path: Path) -> Path:
    """Where the manifest of the checkpoint `path` lies."""
    return path.with_name(path.name + SUFFIX)


def write_manifest(path: Path, record: Record, previous: Record | None = None) -> None:
    """Write the manifest of checkpoint `path`; `previous` while another file is about to be replaced."""
    document: dict[str, Any] = {"format": FORMAT, **asdict(record)}
    document["previous"] = asdict(previous) if previous else None
    write_json(manifest_path(path), document)


def read_manifest(path: Path) -> list[Record]:
    """The records that the checkpoint `path` may match, newest first; empty when it has no manifest."""
    file = manifest_path(path)
    try:
        document = json.loads(file.read_bytes())
        if document["format"] != FORMAT:
            raise CheckpointError(f"{file} has format {document['format']}; this version reads format {FORMAT}")
        entries = [document] + ([document["previous"]] if document["previous"] else [])
        return [Record(e["sha256"], int(e["size"]), int(e["global_step"]), float(e["saved"])) for e in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error


def verify(path: Path) -> Record | None:
    """The record that the file `path` matches, None when it has no manifest; CheckpointError when it is damaged."""
    records = read_manifest(path)
    if not records:
        return None
    size = path.stat().st_size
    if size not in {r.size for r in records}:
        raise CheckpointError(f"{path} is truncated or overwritten: got {size:,} bytes, saved {records[0].size:,}")
    try:
        digest = sha256_file(path)
    except OSError as error:  # a bad sector, or a file of another user
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    for record in records:
        if digest == record.sha256:
            return record
    raise CheckpointError(f"{path} is damaged: got sha256 {digest[:16]}..., saved {records[0].sha256[:16]}...")
