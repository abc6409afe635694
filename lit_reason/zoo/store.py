"""Saving, loading and verifying zoo models: safetensors and JSON, no pickle, no code."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lit_reason.checkpoint.atomic import free_space, fsync_directory, to_json, write_bytes
from lit_reason.data.tokenizer import Tokenizer, check_fingerprint, load_tokenizer
from lit_reason.errors import LitReasonError, ZooError
from lit_reason.models import ModelConfig, Transformer
from lit_reason.models.hf_files import shard_files
from lit_reason.zoo.card import check_info, write_card
from lit_reason.zoo.golden import default_sequences, make_golden, worst_error
from lit_reason.zoo.manifest import Entry, default_shelf, describe, locate, locked, read_entry, read_index, write_index

CONFIG, INFO, GOLDEN, CARD = "config.json", "info.json", "golden.json", "README.md"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
MAX_FILE_BYTES = 14_000_000  # of tensors in one file: a shelf lives in git
TOKENIZER = "tokenizer"
# Keys by which a tokenizer's config asks for code to be imported.
CODE_KEYS = {"auto_map", "trust_remote_code"}


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A loaded model: weights as saved (training mode, as a new module), its tokenizer, its info.json."""

    model: Transformer
    tokenizer: Tokenizer
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found: `max_error` is the largest golden log-prob difference in nats."""

    name: str
    files: int
    size: int
    max_error: float
    tolerance: float


def list_models(shelf: str | Path | None = None) -> list[str]:
    """Names on the shelf, sorted."""
    return sorted(read_index(Path(shelf) if shelf else default_shelf()))


def info(name_or_dir: str | Path, shelf: str | Path | None = None) -> dict[str, Any]:
    """A model's info.json: recipe, seed, commit, metrics with intervals, parameters."""
    return _parse(locate(name_or_dir, shelf), INFO, read_entry(locate(name_or_dir, shelf)))


def load(name_or_dir: str | Path, shelf: str | Path | None = None) -> ZooModel:
    """Load a model of the shelf, or a folder that `save` wrote, after checking every file's sha256.

    Example::

        from lit_reason import zoo

        primed = zoo.load("arith-small.sft")
        mine = zoo.load("dir:runs/demo/best")

    Raises:
        ZooError: unknown name (the nearest are named), or a file is damaged, missing or misplaced.
    """
    entry = locate(name_or_dir, shelf)
    return _build(entry, read_entry(entry))


def verify(name_or_dir: str | Path, shelf: str | Path | None = None) -> Verified:
    """Check every file's sha256 and recompute the golden log-probabilities with the loaded model.

    Raises:
        ZooError: a file is damaged, or the log-probs differ by more than golden.json's tolerance.
    """
    entry = locate(name_or_dir, shelf)
    files = read_entry(entry)
    golden = _parse(entry, GOLDEN, files)
    error, tolerance = worst_error(_build(entry, files).model, golden), golden["tolerance"]
    if not error <= tolerance:
        raise ZooError(
            f"{entry.name}: the files are whole, but log-probabilities differ from golden.json by {error:.3g} nats "
            f"(tolerance {tolerance:.3g}): this version of the code or of torch computes another model. Use the commit "
            "in info.json"
        )
    return Verified(entry.name, len(files), sum(map(len, files.values())), error, tolerance)


def save(
    name_or_dir: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    info: Mapping[str, Any],
    golden: Sequence[Sequence[int]] | None = None,
    shelf: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Put a model on a shelf; `load` gives the same bits back. Returns its folder.

    The folder appears whole or not at all, then the index is replaced, both under the shelf's lock.

    Args:
        name_or_dir: a name on the shelf, or a folder as a `Path` or `"dir:PATH"` (its index lies beside it).
        info: recipe, seed, commit and metrics (`card.REQUIRED`); name, params and dtype are filled in.
        golden: token-id sequences for golden.json; None takes fixed ones spread over the vocabulary.
        overwrite: replace an entry of that name.

    Raises:
        ZooError: the name is taken or malformed, info is incomplete, or the tokenizer does not fit the model.
    """
    entry = locate(name_or_dir, shelf)
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ZooError(
            f"{entry.name}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size} "
            "(model.vocab_size); save the tokenizer that the model was trained with"
        )
    check_info(info)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    facts = {"name": entry.name, "params": sum(p.numel() for p in model.parameters()), "dtype": "+".join(dtypes)}
    info = {**info, **facts}
    weights = {name: _own_memory(value) for name, value in model.state_dict().items()}
    if bad := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise ZooError(f"{entry.name}: {len(bad)} parameters hold NaN or infinity ({bad[0]}, ...); nothing was saved")
    sequences = default_sequences(tokenizer.vocab_size, config.max_seq_len) if golden is None else golden
    files = {
        **_weight_files(weights),
        CONFIG: to_json({"model": config.to_dict(), "tokenizer": {"fingerprint": tokenizer.fingerprint()}}),
        INFO: to_json(info),
        # Of the model that `load` will build: model.to(bfloat16) also rounds its rotary tables, which are not saved.
        GOLDEN: to_json(make_golden(_restore(config, weights), sequences)),
        CARD: write_card(entry.name, info).encode(),
    }
    summary = {**facts, "metrics": info["metrics"], "description": info.get("description", "")}
    try:
        entry.shelf.mkdir(parents=True, exist_ok=True)
        with locked(entry.shelf):
            _put(entry, files, tokenizer, summary, overwrite)
    except OSError as error:
        raise ZooError(
            f"{entry.folder} could not be saved: {error.strerror}, {free_space(entry.shelf)} free. What was there is "
            "untouched; mend that and save again (lit-reason-train: the same command)"
        ) from error
    return entry.folder


def _put(
    entry: Entry, files: Mapping[str, bytes], tokenizer: Tokenizer, summary: Mapping[str, Any], overwrite: bool
) -> None:
    models = read_index(entry.shelf)
    if not overwrite and (entry.name in models or entry.folder.exists()):
        raise ZooError(f"{entry.folder} exists; pass overwrite=True to replace it, or choose another name")
    temporary, old = (entry.shelf / f".{entry.name}.{os.getpid()}.{kind}" for kind in ("tmp", "old"))
    try:
        temporary.mkdir()
        for name, data in files.items():
            write_bytes(temporary / name, data)
        tokenizer.save(temporary / TOKENIZER)
        models[entry.name] = {"files": describe(temporary), "summary": dict(summary)}
        if entry.folder.exists():
            entry.folder.rename(old)
        try:
            temporary.rename(entry.folder)
            fsync_directory(entry.shelf)
            write_index(entry.shelf, models)
        except BaseException:  # the index still describes the old folder
            if entry.folder.exists():
                entry.folder.rename(temporary)
            if old.exists():
                old.rename(entry.folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    # What a killed save left: writers hold the shelf's lock, so nobody is writing it now.
    for leftover in entry.shelf.glob(f".{entry.name}.*"):
        if re.fullmatch(r"\d+\.(tmp|old)", leftover.name.removeprefix(f".{entry.name}.")):
            shutil.rmtree(leftover, ignore_errors=True)


def _weight_files(weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The weights in files of at most about `MAX_FILE_BYTES`."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in weights.items()}
    return {
        file: safetensors.torch.save({name: weights[name] for name in names}, metadata={"format": "pt"})
        for file, names in shard_files(sizes, MAX_FILE_BYTES).items()
    }


def _own_memory(value: Tensor) -> Tensor:
    """A CPU copy that shares nothing: safetensors refuses tensors that overlap."""
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _restore(config: ModelConfig, weights: Mapping[str, Tensor]) -> Transformer:
    """A new model that holds exactly these weights, each in its own dtype."""
    # Initialisation draws random numbers that are overwritten below: the caller's generator must not notice.
    with torch.random.fork_rng(devices=[]):
        model = Transformer(config)
    # assign: keep the saved dtypes, bf16 weights beside an fp32 router for instance.
    model.load_state_dict({name: value.clone() for name, value in weights.items()}, strict=True, assign=True)
    return model


def _build(entry: Entry, files: Mapping[str, bytes]) -> ZooModel:
    document, facts = _parse(entry, CONFIG, files), _parse(entry, INFO, files)
    # Registry keys only: no `_target_`, nothing that this version would silently ignore.
    if document.keys() != {"model", "tokenizer"}:
        raise ZooError(f"{entry.folder / CONFIG} has the keys {sorted(document)}; valid: model, tokenizer")
    try:
        config = ModelConfig.from_dict(document["model"])
        weights: dict[str, Tensor] = {}
        for name in filter(WEIGHTS.fullmatch, files):
            weights |= safetensors.torch.load(files[name])
        model = _restore(config, weights)
        tokenizer = _load_tokenizer(entry, files, document["tokenizer"]["fingerprint"])
    except (LitReasonError, RuntimeError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        if isinstance(error, ZooError):
            raise
        raise ZooError(f"{entry.folder} does not describe a model: {type(error).__name__}: {error}") from error
    return ZooModel(model, tokenizer, facts)


def _load_tokenizer(entry: Entry, files: Mapping[str, bytes], fingerprint: str) -> Tokenizer:
    folder = entry.folder / TOKENIZER
    # A tokenizer library picks files by name: one that the index does not list must not be there to be picked.
    listed = {name for name in files if name.startswith(f"{TOKENIZER}/")}
    present = {path.relative_to(entry.folder).as_posix() for path in folder.rglob("*")}
    if present != listed:
        raise ZooError(f"{folder} holds {sorted(present - listed)}, which the index does not list; remove them")
    for name in sorted(listed):
        if name.endswith("config.json") and (keys := CODE_KEYS & _parse(entry, name, files).keys()):
            raise ZooError(f"{entry.folder / name} holds {sorted(keys)}, which asks for code to be imported; refused")
    tokenizer = load_tokenizer(folder)
    check_fingerprint(tokenizer, fingerprint, where=str(entry.folder))
    return tokenizer


def _parse(entry: Entry, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    if name not in files:
        raise ZooError(f"the index lists no {name} for {entry.name!r}; save the model again")
    try:
        document = json.loads(files[name])
    except ValueError as error:
        raise ZooError(f"{entry.folder / name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ZooError(f"{entry.folder / name} holds a {type(document).__name__}, expected an object")
    return document
