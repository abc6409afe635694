"""Checksums of weights: what a frozen reference is known by, and what tells two copies apart."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
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


def digest(tensor: Tensor) -> int:
    """A 64-bit sum over the tensor's bytes in row-major order, eight at a time times an odd number of their place.

    Quick on any device, with no copy of the tensor on the host: what `sync` compares after every weight push. It is the
    same on every device, and any change of one element changes it; two changes cancel by chance once in 2^64. It is no
    protection against someone who wants them to cancel: that is `checksum`.
    """
    words = _words(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK]
        total = total * _FACTOR + (chunk * _places(words.device)[: chunk.numel()]).sum()  # modulo 2^64
    return int(total) & (2**64 - 1)


def _words(raw: Tensor) -> Tensor:
    """Bytes as int64; what is missing at the end is 0."""
    if raw.numel() % 8:
        raw = F.pad(raw, (0, -raw.numel() % 8))
    elif raw.storage_offset() % 8:  # a view starts at multiples of its element
        raw = raw.clone()
    return raw.view(torch.int64)


_CHUNK = 1 << 18
_FACTOR = 0x5851F42D4C957F2D  # Knuth's multiplier for MMIX: odd


@functools.cache
def _places(device: torch.device) -> Tensor:
    """Odd pseudo-random int64 numbers, one for each place of a chunk (splitmix64's finaliser of a counter)."""
    with np.errstate(over="ignore"):
        x = np.arange(1, _CHUNK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(x.view(np.int64)).to(device)
