"""The quantising kernels on a GPU: every bit the reference's, from run to run."""

import pytest
import torch
from lit_kernels.quantise import quantise_blocks, quantise_both, quantise_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def every(x, kind, backend):
    return (
        quantise_rows(x, kind, backend),
        quantise_blocks(x, kind, backend),
        quantise_blocks(x, kind, backend, transposed=True),
        *quantise_both(x, kind, backend),
    )


@pytest.mark.parametrize("kind", ["float", "power of two"])
@pytest.mark.parametrize("shape", [(4096, 7168), (4001, 2112), (1, 16)], ids=str)
def test_every_bit_is_the_references(shape, kind):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * torch.randn(shape[0], 1, device="cuda").exp()
    for found, expected in zip(every(x, kind, "triton"), every(x, kind, "torch"), strict=True):
        assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(found.scales, expected.scales)
