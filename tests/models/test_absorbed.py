"""The decoding layout of latent attention computes what the layer itself does."""

import pytest
import torch

from lit_reason.models import Transformer, Yarn
from lit_reason.models.absorbed import Absorbed
from lit_reason.models.rope import rope_table

VARIANTS = {
    "plain": {},
    "q_lora": {"q_lora_rank": 20},
    "yarn": {"yarn": Yarn(factor=4.0, original_max_seq_len=16, mscale_all_dim=0.707), "heads": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_layout_gives_what_the_layer_gives(tiny, variant):
    torch.manual_seed(0)
    config = tiny(**VARIANTS[variant])
    mla = Transformer(config).blocks[1].attn
    mla.kv_norm.weight.uniform_(0.5, 1.5)
    rotation = rope_table(config, torch.device("cpu"))[torch.tensor([[3], [40], [0], [11], [7]])]
    x, seen = torch.randn(5, 1, config.width), []

    def attend(q_THC, new_BKC):
        seen.append((q_THC, new_BKC))
        return torch.tanh(q_THC * 3 + new_BKC)  # whatever comes back must take the same way out

    wanted = mla.decode(x, rotation, attend)
    got = Absorbed(mla).decode(x, rotation, attend)
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
