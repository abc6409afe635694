"""The shelf and its index: `index.json` names every file of every model with its sha256 and size.

    zoo/
      index.json
      arith-small.sft/   README.md  config.json  golden.json  info.json  model.safetensors  tokenizer/...

Nothing is parsed before its bytes matched the index. Names and file names are checked before they become paths.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_reason.checkpoint.atomic import write_json
from lit_reason.errors import ZooError, nearest

FORMAT = 1
INDEX = "index.json"
FOLDER_PREFIX = "dir:"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a shelf: `shelf/name/`."""

    shelf: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.shelf / self.name


def default_shelf() -> Path:
    """The shelf inside an installed wheel, else the `zoo/` folder of the source checkout."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "_shelf"
    return shipped if (shipped / INDEX).is_file() else package.parent / "zoo"


def locate(name_or_dir: str | Path, shelf: str | Path | None = None) -> Entry:
    """The entry that a name, a `Path` or `"dir:PATH"` means; ZooError for anything that is no plain name.

    A folder's index is the `index.json` beside it, so a folder that `save` wrote anywhere can be loaded.

    Example::

        >>> locate("dir:runs/demo/best").name
        'best'
    """
    if isinstance(name_or_dir, str) and not name_or_dir.startswith(FOLDER_PREFIX):
        if not _PART.fullmatch(name_or_dir):
            raise ZooError(
                f"{name_or_dir!r} is not the name of a zoo model (letters, digits, '.', '_', '-'). "
                + _instead(Path(name_or_dir), f"To load a folder of your own, type {FOLDER_PREFIX}{name_or_dir}")
            )
        return Entry(Path(shelf).absolute() if shelf else default_shelf(), name_or_dir)
    folder = Path(str(name_or_dir).removeprefix(FOLDER_PREFIX)).absolute()
    if not _PART.fullmatch(folder.name):
        advice = _instead(folder, "Its last part must be letters, digits, '.', '_', '-'")
        raise ZooError(f"{folder} cannot hold a zoo model. {advice}")
    return Entry(folder.parent, folder.name)


def _instead(path: Path, otherwise: str) -> str:
    """What to type; a checkpoint of training is no model, but a finished stage left one beside its folder."""
    if path.suffix != ".ckpt":
        return otherwise
    model = path.absolute().parent.parent / "model"
    return f"A .ckpt holds a training's state; a finished stage's weights are a folder: {FOLDER_PREFIX}{model}"


def read_index(shelf: Path) -> dict[str, Any]:
    """`{name: {"files": {file: {"sha256", "size"}}, "summary": {...}}}`; empty when there is no index."""
    path = shelf / INDEX
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT:
            raise ZooError(f"{path} has format {document['format']}; this version reads format {FORMAT}")
        models = document["models"]
        whole = all(
            isinstance(entry["summary"], dict) and all({"sha256", "size"} <= f.keys() for f in entry["files"].values())
            for entry in models.values()
        )
        if not whole:
            raise ValueError("an entry lacks summary, sha256 or size")
        return models
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(
            f"{path} is damaged ({type(error).__name__}: {error}). Get the shelf again; in a run's own folder, delete "
            "this file and run the same command again"
        ) from error


def read_entry(entry: Entry) -> dict[str, bytes]:
    """The bytes of every file of a model, each checked against the index.

    Bytes are returned and parsed, never read a second time, so that what was checked is what is used.

    Raises:
        ZooError: unknown name, or a file is missing, damaged, a link out of the shelf, or not where it may be.
    """
    models = read_index(entry.shelf)
    if entry.name not in models:
        known = nearest(entry.name, models) if models else f"it has no {INDEX}, or an empty one; copy it too"
        raise ZooError(f"no model {entry.name!r} in the shelf {entry.shelf}: {known}")
    files = models[entry.name]["files"]
    return {name: _read_checked(entry, name, files[name]) for name in sorted(files)}


def _read_checked(entry: Entry, name: str, record: Mapping[str, Any]) -> bytes:
    path = _inside(entry, name)
    advice = f"Get {entry.name!r} again; a damaged model is never loaded"
    if not path.is_file():
        raise ZooError(f"{path} is missing. {advice}")
    size = path.stat().st_size
    if size != record["size"]:
        raise ZooError(f"{path} is damaged: got {size} bytes, the index says {record['size']}. {advice}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != record["sha256"]:
        raise ZooError(
            f"{path} is damaged: got sha256 {digest[:16]}..., the index says {record['sha256'][:16]}.... {advice}"
        )
    return data


def _inside(entry: Entry, name: str) -> Path:
    """The path of a listed file, at most one folder deep, refused when it leaves the model's folder."""
    parts = name.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(part) for part in parts):
        raise ZooError(f"the index of {entry.shelf} lists {name!r} for {entry.name!r}, which is not a plain file name")
    path = entry.folder / name
    if path.resolve() != entry.shelf.resolve() / entry.name / name:
        raise ZooError(f"{path} is a link to {path.resolve()}; zoo files must lie in the shelf itself")
    return path


@contextmanager
def locked(shelf: Path) -> Iterator[None]:
    """Hold the shelf while its index changes; other processes wait."""
    descriptor = os.open(shelf, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in paths
    }


def write_index(shelf: Path, models: Mapping[str, Any]) -> None:
    """Replace the index, atomically; call it inside `locked(shelf)`."""
    write_json(shelf / INDEX, {"format": FORMAT, "models": dict(models)})
