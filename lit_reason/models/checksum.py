"""Checksums of weights: what a frozen reference is known by, and what tells two copies apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_reason.models.adapters import adapted_layers, owner, plain_name


def checksum(model: nn.Module) -> str:
    """sha256 over every parameter and persistent buffer: names, dtypes, shapes and bytes. 64 hex digits."""
    return _digest(model.state_dict())


def base_checksum(model: nn.Module) -> str:
    """`checksum` of the base under the model's adapters: that of the model they were put into."""
    layers = adapted_layers(model)
    return _digest({plain_name(n): tensor for n, tensor in model.state_dict().items() if owner(n, layers) is None})


@torch.no_grad()
def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
