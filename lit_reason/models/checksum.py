"""Checksums of weights: what a frozen reference is known by, and what tells two copies apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.no_grad()
def checksum(model: nn.Module, frozen_only: bool = False) -> str:
    """sha256 over every parameter and persistent buffer: names, dtypes, shapes and bytes. 64 hex digits.

    Args:
        frozen_only: leave the parameters out that are trained.
    """
    digest = hashlib.sha256()
    left_out = {name for name, p in model.named_parameters() if p.requires_grad} if frozen_only else set()
    for name, tensor in sorted(model.state_dict().items()):
        if name in left_out:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
