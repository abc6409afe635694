"""Which checkpoint a run continues from."""

from __future__ import annotations

import logging
from pathlib import Path

from lit_reason.checkpoint.manifest import SUFFIX, Record, read_manifest, verify
from lit_reason.errors import CheckpointError, nearest

log = logging.getLogger(__name__)


def find_resume(run_dir: str | Path, resume: str | Path = "auto") -> Path | None:
    """The checkpoint to pass to `trainer.fit(ckpt_path=...)`, verified; None to start from scratch.

    Example::

        trainer.fit(module, ckpt_path=find_resume("runs/demo", resume="auto"))

    Args:
        run_dir: a run directory; its `checkpoints/*.ckpt` (or its own `*.ckpt`) are the candidates.
        resume: `"auto"` takes the one with the highest global step that is whole and says which newer ones are
            damaged and why; `"never"` takes none; a path takes that file, or the newest of that run directory.

    Raises:
        CheckpointError: the given path does not exist or is damaged; or `"auto"` found checkpoints that finished
            saving, and every one is damaged; or several of which none has a manifest.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return _newest_whole(Path(run_dir))
    path = Path(resume)
    if path.is_dir():
        found = _newest_whole(path)
        if found is None:
            stages = [f"resume={folder.parent}" for folder in sorted(path.glob("*/checkpoints"))]
            hint = f" Type {' or '.join(stages)}" if stages else ""
            raise CheckpointError(f"resume={path}: no finished checkpoint in this folder.{hint}")
        return found
    if not path.is_file():
        hint = nearest(str(resume), ("auto", "never"))
        raise CheckpointError(f"resume={resume}: no such file. {hint}, or the path of a checkpoint")
    verify(path.resolve())
    _warn_of_newer(Path(run_dir), path)
    return path


def _candidates(run_dir: Path) -> list[Path]:
    """Checkpoint files of a run; links are left out, what they point to is in the same folder."""
    folder = run_dir / "checkpoints"
    folder = folder if folder.is_dir() else run_dir
    return sorted(p for p in folder.glob("*.ckpt") if p.is_file() and not p.is_symlink())


def _newest_whole(run_dir: Path) -> Path | None:
    """Hashes candidates from the newest down and stops at the first whole one."""
    ranked: list[tuple[Record, Path]] = []
    damaged: list[str] = []
    bare: list[str] = []
    for path in _candidates(run_dir):
        try:
            records = read_manifest(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if records:
            ranked.append((records[0], path))
        else:
            bare.append(path.name)
            log.warning("%s has no manifest: its save did not finish, or another tool wrote it; skipped", path)
    ranked.sort(key=lambda entry: (entry[0].global_step, entry[0].saved), reverse=True)
    for record, path in ranked:
        try:
            whole = verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        step = (whole or record).global_step
        if damaged:
            log.warning("damaged, skipped: %s. Falling back to %s (global step %d)", "; ".join(damaged), path, step)
        else:
            log.info("resuming from %s (global step %d)", path, step)
        return path
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {run_dir} is damaged: {'; '.join(damaged)}. Type resume=never to start again "
            "(the damaged files are kept), or resume=PATH for a checkpoint from elsewhere"
        )
    if len(bare) > 1:  # a killed save leaves one; these were copied, and starting from scratch would be a surprise
        raise CheckpointError(
            f"none of the checkpoints in {run_dir} ({', '.join(bare)}) has its manifest. Put the files *{SUFFIX} "
            "beside them, or type resume=PATH to take one unchecked, or resume=never to start again (all is kept)"
        )
    return None


def _warn_of_newer(run_dir: Path, chosen: Path) -> None:
    """An older checkpoint named by hand leaves newer ones behind, which `auto` would take next time."""
    try:
        steps = {path: records[0].global_step for path in _candidates(run_dir) if (records := read_manifest(path))}
    except CheckpointError:
        return
    mine = steps.get(chosen)
    newer = sorted(path.name for path, step in steps.items() if mine is not None and step > mine)
    if newer:
        log.warning(
            "resuming from %s, but %s in the same run are newer and resume=auto would take them next time; "
            "move them away or use another run_dir",
            chosen,
            ", ".join(newer),
        )
