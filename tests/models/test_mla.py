"""Absorbed decoding from the latent cache is the same function as the full forward."""

import pytest
import torch

from lit_reason.models import Transformer, Yarn

VARIANTS = {
    "plain": {},
    "q_lora": {"q_lora_rank": 20},
    "groups": {"expert_groups": 4, "groups_per_token": 2, "routed_scale": 2.5, "experts_per_token": 3},
    "yarn": {"yarn": Yarn(factor=4.0, original_max_seq_len=16, mscale_all_dim=0.707), "v_head_dim": 16},
}


def trained_like(config) -> Transformer:
    """A model whose norms and biases are not at their neutral initial values."""
    torch.manual_seed(0)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    for router in model.routers():
        router.bias_E.normal_(std=0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decode_equals_the_full_forward_over_64_tokens(tiny, variant):
    model = trained_like(tiny(**VARIANTS[variant]))
    prompts = [5, 17, 1, 30]  # ragged lengths
    ids_BT = torch.randint(0, 40, (4, 30 + 64))
    expected_BTV = model(ids_BT)
    length_B = torch.tensor(prompts)
    cache = model.new_cache(4, 30 + 64)
    logits_BV = model.prefill(ids_BT[:, :30], length_B, cache)
    rows = torch.arange(4)
    torch.testing.assert_close(logits_BV, expected_BTV[rows, length_B - 1], atol=1e-4, rtol=0)
    for step in range(64):
        position_B = length_B + step
        logits_BV = model.decode(ids_BT[rows, position_B], position_B, cache)
        torch.testing.assert_close(logits_BV, expected_BTV[rows, position_B], atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_cache_holds_one_latent_and_one_rotary_key_a_token(tiny):
    cache = Transformer(tiny()).new_cache(3, capacity=33)
    assert [tuple(layer.shape) for layer in cache.layers] == [(3, 48, 12 + 4)] * 2  # 33 rounds up to 48
    assert cache.bytes() == 2 * 3 * 48 * 16 * 4
    cache.layers[0][:, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    cache.select(torch.tensor([2, 0, 0, 1]))
    assert cache.layers[0][:, 0, 0].tolist() == [3, 1, 1, 2] and cache.rows == 4


@pytest.mark.parametrize("value", [4, 12, 20])
@torch.no_grad()
def test_long_sequences_take_the_fused_path_with_the_same_result(tiny, value):
    """The switch lies at 512 tokens: causality lets one half of a 600-token forward check the other."""
    model = trained_like(tiny(max_seq_len=640, v_head_dim=value))
    ids = torch.randint(0, 40, (1, 600))
    torch.testing.assert_close(model(ids)[:, :500], model(ids[:, :500]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(tiny):
    model = trained_like(tiny())
    ids = torch.randint(0, 40, (2, 20))
    padded = torch.cat((ids, torch.zeros(2, 9, dtype=torch.int64)), dim=1)
    torch.testing.assert_close(model(padded)[:, :20], model(ids), atol=1e-5, rtol=0)
