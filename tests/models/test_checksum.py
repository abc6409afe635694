"""The quick digest against a plain implementation of its definition, and what it must tell apart."""

import pytest
import torch

from lit_reason.models import checksum as module
from lit_reason.models.checksum import digest

MASK = 2**64 - 1


def plain(raw: bytes, chunk: int) -> int:
    """sum over chunks of factor^(chunks after it) * sum of eight bytes * place, modulo 2^64."""
    values = [int.from_bytes(raw[start : start + 8], "little") for start in range(0, len(raw), 8)]

    def place(i: int) -> int:  # splitmix64 of the counter i + 1, made odd
        x = (i + 1) * 0x9E3779B97F4A7C15 & MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return (x ^ x >> 31) | 1

    total = 0
    for start in range(0, len(values), chunk):
        part = sum(value * place(i) for i, value in enumerate(values[start : start + chunk]))
        total = (total * 0x5851F42D4C957F2D + part) & MASK
    return total


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn]
)
def test_it_is_its_definition(dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 16)
    module._places.cache_clear()
    for rows in (16, 5):  # whole words of all dtypes, and not
        tensor = (torch.randn(rows, 7, generator=torch.Generator().manual_seed(3)) * 9).to(dtype)
        assert digest(tensor) == plain(tensor.flatten().view(torch.uint8).numpy().tobytes(), 16)
    module._places.cache_clear()


def test_a_small_value_by_hand():
    """The bits of 1.0 are 0x3F800000; the first number of splitmix64 from seed 0 is known, and odd."""
    assert digest(torch.tensor([1.0])) == (0x3F800000 * 0xE220A8397B1DCDAF) % 2**64
    assert digest(torch.zeros(7)) == digest(torch.empty(0)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_change_of_one_element_is_seen(dtype):
    tensor = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    before = digest(tensor)
    for i in range(len(tensor)):
        for bit in (0, 1, 7, 15):  # the smallest change there is, and larger ones
            changed = tensor.view(bits).clone()
            changed[i] ^= torch.tensor(1 << bit if bit < 15 else -(1 << 15)).to(bits)
            assert digest(changed.view(dtype)) != before, (i, bit)


def test_order_counts_and_memory_does_not():
    tensor = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    seen = {digest(tensor), digest(tensor.t()), digest(tensor.flip(0)), digest(tensor.roll(1)), digest(-tensor)}
    swapped = tensor.clone()
    swapped[0, 0], swapped[0, 1] = tensor[0, 1], tensor[0, 0]
    assert len(seen | {digest(swapped)}) == 6
    strided = torch.stack((tensor, tensor), -1)[..., 0]
    assert (
        digest(strided) == digest(tensor) == digest(tensor.t().contiguous().t()) == digest(torch.nn.Parameter(tensor))
    )
    assert digest(tensor.view(-1)) == digest(tensor)


def test_elements_beyond_a_chunk_count():
    tensor = torch.zeros(module._CHUNK + 3, dtype=torch.float64)
    others = []
    for i in (0, module._CHUNK, module._CHUNK + 2):
        other = tensor.clone()
        other[i] = 1
        others.append(digest(other))
    assert len({digest(tensor), *others}) == 4
