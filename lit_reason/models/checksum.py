"""Checksums of weights: what a frozen reference is known by, and what tells two copies apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.no_grad()
def checksum(model: nn.Module) -> str:
    """sha256 over every parameter and persistent buffer: names, dtypes, shapes and bytes. 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
