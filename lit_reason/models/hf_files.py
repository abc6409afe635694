"""The files of a checkpoint folder: safetensors read one tensor at a time, FP8 blocks dequantised, JSON."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_reason.errors import ConfigError, DataError
from lit_reason.models.hf_config import CONFIG, DTYPES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ROUNDING = "mup_rounding.bin"  # safetensors; no engine takes it for weights under this name


def shard_files(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensor names in order, cut before a file's tensors would exceed `limit` bytes; a single one may."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, start=1)}


class Shards:
    """The tensors of a folder, read one at a time; FP8 ones dequantised. `used` are the names that were asked for."""

    def __init__(self, folder: Path, block: tuple[int, int]) -> None:
        self.folder, self.block = folder, block
        self.file_of = _file_of(folder)
        self.used: set[str] = set()
        # Few, so that what was read can leave memory: a weight's, its scale's and the rounding.
        self._open = functools.lru_cache(maxsize=3)(functools.partial(safe_open, framework="pt"))

    def mtp_depth(self) -> int:
        """How many multi-token-prediction layers the files hold; config.json often names one that is not there."""
        return sum(name.endswith(".eh_proj.weight") for name in self.file_of)

    def ordered(self, names: Sequence[str]) -> list[str]:
        """`names` file after file. DataError if the folder lacks some."""
        if missing := [name for name in names if name not in self.file_of]:
            raise DataError(f"{self.folder} lacks {len(missing)} tensors that {CONFIG} asks for: {some(missing)}")
        return sorted(names, key=lambda name: (self.file_of[name], name))

    def read(self, name: str) -> Tensor:
        """The tensor in float32 or its own, smaller, floating dtype."""
        weight = self._raw(name)
        if weight.dtype == torch.float8_e4m3fn:
            scale = f"{name}_scale_inv"
            if scale not in self.file_of:
                raise DataError(f"{self.folder}: {name} is float8 and has no {scale}; only block-scaled FP8 is read")
            return dequantise(weight, self._raw(scale), self.block, name)
        if weight.dtype not in DTYPES.values():
            valid = ", ".join([*DTYPES, "float8_e4m3fn with block scales"])
            raise DataError(f"{self.folder}: {name} is {weight.dtype}; valid: {valid}")
        return weight

    def rounding(self, name: str) -> Tensor | None:
        """What `unfold` takes; None when folding `name` lost nothing, or another program wrote the folder."""
        path = self.folder / ROUNDING
        if not path.is_file():
            return None
        with _reading(path):
            file = self._open(path)
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - not a dict

    def _raw(self, name: str) -> Tensor:
        self.used.add(name)
        path = self.folder / self.file_of[name]
        with _reading(path):
            return self._open(path).get_tensor(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or incomplete ({error}); copy it again") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end of the block, whole, or not at all.

    Raises:
        ConfigError: `folder` is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; give the name of a new folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _file_of(folder: Path) -> dict[str, str]:
    """{tensor: file} from the index, or from the only file's own header."""
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) and Path(f).name == f for f in names.values()):
            raise DataError(f"{folder / INDEX}: weight_map must map tensor names to file names of that folder")
        if missing := sorted(f for f in set(names.values()) if not (folder / f).is_file()):
            raise DataError(f"{folder} lacks {len(missing)} files that its index lists: {some(missing)}")
        return names
    path = folder / WEIGHTS
    if not path.is_file():
        raise DataError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    with _reading(path), safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128), name: str = "weight") -> Tensor:
    """weight_ij * scale_(i // block rows, j // block columns) in float32 (DeepSeek-V3, 2412.19437 section 3.3).

    Args:
        weight: float8_e4m3fn (out, in); neither needs to be a multiple of the block.
        scale: float32 (ceil(out / block rows), ceil(in / block columns)).
    """
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if tuple(scale.shape) != expected:
        raise DataError(f"{name}_scale_inv has shape {tuple(scale.shape)}; {tuple(weight.shape)} needs {expected}")
    rows, columns = (torch.arange(size) // step for size, step in zip(weight.shape, block, strict=True))
    return weight.float() * scale.float()[rows][:, columns]


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give a folder with {CONFIG} and safetensors") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds a {type(document).__name__}, expected an object")
    return document


def to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"
