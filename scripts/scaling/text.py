"""Real text that every machine has: the source of Python's own standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lit_reason.data.corpus import pack
from lit_reason.data.tokenizer import ByteTokenizer

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@cache
def source_rows(seq_len: int, max_bytes: int = 10_000_000) -> Tensor:
    """int64 (rows, seq_len + 1): modules in an order of their own, packed end to end, rows shuffled; tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    texts, size = [], 0
    for path in sorted(files, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).digest()):
        if size >= max_bytes:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
    rows_NT = pack(texts, ByteTokenizer(), seq_len)
    return rows_NT[torch.randperm(len(rows_NT), generator=torch.Generator().manual_seed(0))]


def digest(rows_NT: Tensor) -> str:
    """16 hex digits of the text: another Python release has another standard library."""
    return hashlib.sha256(rows_NT.numpy().tobytes()).hexdigest()[:16]
