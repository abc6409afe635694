"""Which implementation of an operation runs, and why.

    torch     plain torch, or a library's kernel that torch calls; everywhere
    triton    ours; on a GPU, or with TRITON_INTERPRET=1 on a CPU, far too slowly for anything but tests
    auto      what was faster for the nearest shape that scripts/bench_kernels.py measured on this GPU; else torch

Nothing falls back silently: what was asked for runs, or is refused.

Example::

    >>> choose("rms_norm", "auto", torch.device("cpu"), (4096, 7168))
    Choice(backend='torch', why='Triton kernels do not run on a cpu')
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

Backend = Literal["auto", "torch", "triton"]
WITH_FP8 = (8, 9)  # compute capability
TABLE = Path(__file__).with_name("measured.json")


class UnsupportedError(NotImplementedError, ValueError):
    """An implementation was asked for that cannot run this case."""


class Choice(NamedTuple):
    """`backend` is "torch" or "triton", `why` a clause that can follow "because"."""

    backend: str
    why: str


def choose(op: str, backend: str, device: torch.device, shape: tuple[int, ...], fp8: bool = False) -> Choice:
    """Resolves `backend` for an operation on tensors of `shape` (which dimensions: as in the measured table).

    Args:
        fp8: whether its Triton kernel writes or multiplies FP8, which older GPUs cannot.

    Raises:
        UnsupportedError: Triton was asked for where it cannot run.
        ValueError: there is no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{op} got backend={backend!r}; valid: {', '.join(get_args(Backend))}")
    if backend == "torch":
        return Choice("torch", "it was asked for")
    missing = missing_for_triton_fp8(device) if fp8 else missing_for_triton(device)
    if backend == "triton":
        if missing:
            raise UnsupportedError(f"{op} got backend='triton', but {missing}. Type backend='auto' or backend='torch'")
        return Choice("triton", "it was asked for")
    if missing:
        return Choice("torch", missing)
    if device.type != "cuda":
        return Choice("torch", "Triton's interpreter is for tests")
    return _measured(op, torch.cuda.get_device_name(device), shape)


def missing_for_triton(device: torch.device) -> str:
    """Why Triton kernels cannot run there; empty if they can."""
    if not _has_triton():
        return "the package triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"Triton kernels do not run on a {device.type}"
    return ""


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing_for_triton_fp8(device: torch.device) -> str:
    """Why Triton has no FP8 product there; empty if it has."""
    if not (reason := missing_for_triton(device)) and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < WITH_FP8:
            return f"compute capability {capability[0]}.{capability[1]} has no FP8 product; valid: 8.9 and above"
    return reason


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, before triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def table() -> dict[str, Any]:
    """{GPU: {operation: [{"shape": [...], "torch": ms, "triton": ms}, ...]}}, written by scripts/bench_kernels.py."""
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


@lru_cache(1024)  # numbers of rows may differ at every step
def _measured(op: str, gpu: str, shape: tuple[int, ...]) -> Choice:
    rows = [row for row in table().get(gpu, {}).get(op, ()) if len(row["shape"]) == len(shape)]
    if not rows:
        return Choice("torch", f"{op} was not measured on {gpu}; scripts/bench_kernels.py does")
    nearest = min(rows, key=lambda row: _distance(row["shape"], shape))
    best = min(("torch", "triton"), key=lambda name: nearest.get(name) or math.inf)
    times = ", ".join(f"{name} {nearest[name]:.3g} ms" for name in ("torch", "triton") if nearest.get(name))
    return Choice(best, f"at {tuple(nearest['shape'])} on {gpu}: {times}")


def _distance(a: list[int], b: tuple[int, ...]) -> float:
    """In octaves."""
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))
