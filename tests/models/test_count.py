"""Counts against published numbers, against the built model, and against torch's own FLOP counter."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from lit_reason.config import instantiate
from lit_reason.errors import ConfigError
from lit_reason.models import LatentCache, ModelConfig, Transformer, parameter_roles
from lit_reason.models.count import Layout, count

CONF = Path(__file__).parents[2] / "conf" / "model"
PUBLISHED = ("deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b_a3b")
ODD: dict[str, dict] = {
    "plain": {},
    "query latent": {"q_lora_rank": 9, "v_head_dim": 5},
    "all dense": {"first_dense": 2},
    "no dense, no shared": {"first_dense": 0, "shared_experts": 0},
    "odd sizes": {"vocab_size": 37, "width": 27, "ffn_width": 41, "expert_width": 7, "shared_experts": 3, "depth": 5},
    "groups": {"experts": 12, "expert_groups": 3, "groups_per_token": 2, "experts_per_token": 5, "heads": 3},
}
BYTES = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "gathered_bytes")


def published(name: str) -> ModelConfig:
    return instantiate(OmegaConf.load(CONF / f"{name}.yaml"))


def held(found, names=BYTES):
    return [getattr(found, name) for name in names]


# Counted on transformers' models on the meta device: total, active, active without embedding, and without the head too.
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("deepseek_v3", (671_026_404_352, 37_552_282_624, 36_625_603_584, 35_698_924_544)),
        ("deepseek_v2", (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320)),
        ("deepseek_v2_lite", (15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808)),
        ("moonlight_16b_a3b", (15_960_108_544, 2_914_774_528, 2_579_230_208, 2_243_685_888)),
    ],
)
def test_published_parameters(name, wanted):
    found = count(published(name))
    without = found.active - found.embedding
    assert (found.total, found.active, without, without - found.head) == wanted


def test_the_whole_checkpoint_of_deepseek_v3():
    """685B on disk: the model, its MTP layer with copies of embedding and head, and 59 routers' biases."""
    found = count(published("deepseek_v3"), mtp_layers=1)
    assert found.mtp == 11_610_067_968
    assert found.total == 671_026_404_352  # MTP is counted apart
    assert found.total + found.mtp + found.embedding + found.head + 59 * 256 == 684_489_845_504


@pytest.mark.parametrize(("name", "kv"), [("deepseek_v3", 70_272), ("deepseek_v2_lite", 31_104)])
def test_published_kv_bytes(name, kv):
    assert count(published(name), dtype="bf16").kv_bytes == kv
    assert count(published(name), dtype="bf16", kv_dtype="fp8").kv_bytes == kv // 2


@pytest.mark.parametrize(("name", "gflops"), [("deepseek_v3", 250), ("deepseek_v2", 155)])
def test_published_training_flops(name, gflops):
    """GFLOPs per token at 4,096 tokens (2505.09343, table 2)."""
    assert round(count(published(name), seq_len=4096).training_flops / 1e9) == gflops


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_is_its_own_base(name):
    config = published(name)
    assert config.base_config() == config
    assert config.residual_scale == 1.0


@pytest.mark.parametrize("case", ODD)
def test_parameters_of_the_built_model(tiny, case):
    config = tiny(**ODD[case])
    model, found = Transformer(config), count(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    idle = sum(n for name, n in sizes.items() if ".experts." in name)
    idle -= idle // config.experts * config.experts_per_token
    assert (found.total, found.active) == (sum(sizes.values()), sum(sizes.values()) - idle)
    assert (found.embedding, found.head) == (sizes["embed.weight"], sizes["head.weight"])


@pytest.mark.parametrize("case", ODD)
def test_parameters_of_built_mtp_modules(tiny, case):
    config = tiny(**ODD[case], mtp_depth=2)
    found = count(config)
    assert found.total == count(config, mtp_layers=0).total
    assert found.total + found.mtp == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_models_on_the_meta_device(name):
    with torch.device("meta"):
        model = Transformer(published(name))
    assert count(published(name)).total == sum(p.numel() for p in model.parameters())
    roles = parameter_roles(model)
    assert {(role.lr, role.weight_decay) for role in roles.values()} <= {(1.0, 0.0), (1.0, 1.0)}
    assert {role.eps for role in roles.values()} == {1.0}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_one_rank_is_what_torch_allocates(tiny, case, dtype):
    """Routers stay float32 in a bfloat16 model; AdamW's step counters are left out."""
    config = tiny(**ODD[case])
    model = Transformer(config).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    kept = [optimizer.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq")]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    wanted = [sum(t.nbytes for t in tensors) for tensors in (model.parameters(), grads, kept)]
    found = count(config, dtype={torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    assert held(found) == [*wanted, 0]


def test_kv_bytes_of_the_cache(tiny):
    cache = LatentCache(tiny(depth=3), rows=2, capacity=32, dtype=torch.float16)
    assert count(tiny(depth=3), dtype="fp16").kv_bytes * 2 * 32 == cache.bytes()


def seen_flops(model, ids_BT, backward=False):
    with FlopCounterMode(display=False) as counter:
        logits = model.train(backward)(ids_BT)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", ["plain", "query latent", "all dense", "no dense, no shared"])
def test_flops_against_torchs_counter(tiny, case, backward):
    """The counter sees every matrix product, and all T x T scores, also those that the causal mask hides: T for each
    (T + 1) / 2 of ours. Every expert is chosen by each of the 32 tokens, so no slot of the dealt blocks is empty."""
    config = tiny(**(ODD[case] | {"experts": 4, "experts_per_token": 4}))
    B, T = 2, 16
    found = count(config, seq_len=T)
    forward = found.flops + found.attention_flops * (T - 1) // (T + 1)
    seen = seen_flops(Transformer(config), torch.arange(B * T).view(B, T), backward)
    assert seen == (3 if backward else 1) * B * T * forward
    assert found.training_flops == 3 * found.flops


def test_flops_of_k_of_e_experts(tiny):
    """Here the counter sees the empty slots of idle experts, too: all 32 tokens choose the same 2 of 8 experts, and
    every expert's block has room for 32. That is 6 experts more for each of the tokens than are counted."""
    config = tiny(depth=3)
    model, T = Transformer(config), 16
    with torch.no_grad():
        for router in model.routers():
            router.weight.zero_()
            router.bias_E.copy_(torch.arange(8.0))
    found = count(config, seq_len=T)
    idle = 2 * (8 - 2) * 3 * config.width * config.expert_width * config.moe_layers
    seen = seen_flops(model, torch.arange(2 * T).view(2, T))
    assert seen == 2 * T * (found.flops + found.attention_flops * (T - 1) // (T + 1) + idle)


def test_an_mtp_layer_costs_a_block_a_projection_the_head_and_attention(tiny):
    """A model one block deeper has one block and its attention more; what MTP adds to that is written out."""
    config, T = tiny(), 16
    one, plain, deeper = (count(c, seq_len=T, mtp_layers=n) for c, n in ((config, 1), (config, 0), (tiny(depth=3), 0)))
    D = config.width
    assert one.mtp == deeper.total - plain.total + 2 * D * D + 3 * D
    extra = deeper.flops - plain.flops + 2 * (2 * D * D + config.vocab_size * D)
    assert one.training_flops - plain.training_flops == 3 * extra
    assert (one.flops, one.kv_bytes) == (plain.flops, plain.kv_bytes)
    assert one.weight_bytes - plain.weight_bytes == 2 * one.mtp + 2 * config.experts * D  # its router is fp32


def test_muon_keeps_one_value_for_each_value_of_a_matrix(tiny):
    config = tiny()
    model = Transformer(config)
    roles = parameter_roles(model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if roles[name].kind in ("hidden", "expert"))
    adamw, muon, mini, mars = (
        count(config, dtype="fp32", optimizer=name).optimizer_bytes for name in ("adamw", "muon", "adam_mini", "mars_m")
    )
    assert (adamw - muon, adamw - mini, adamw - mars) == (4 * matrices, 4 * matrices, 0)


def test_inference_has_weights_only(tiny):
    found = count(tiny(), optimizer="none")
    assert held(found) == [count(tiny()).weight_bytes, 0, 0, 0]
    assert found.memory_bytes == found.weight_bytes


def test_master_weights_are_18_bytes_a_parameter(tiny):
    """bf16 weight 2, fp32 gradient 4, copy 4, moments 8; an fp32 router has no copy: 16. fp32 weights never have."""
    config = tiny()
    router = config.moe_layers * config.experts * config.width
    found = count(config, dtype="bf16", master_weights=True)
    assert found.memory_bytes == 18 * (found.total - router) + 16 * router
    assert count(config, dtype="fp32", master_weights=True).memory_bytes == 16 * found.total


@pytest.mark.parametrize("zero", range(4))
def test_zero_shards_what_its_stage_says(tiny, zero):
    """Every size of this shape is divisible by 4, so nothing is rounded."""
    config = tiny(kv_lora_rank=16)
    whole = count(config)
    found = count(config, layout=Layout(data=4, zero=zero))
    shards = [4 if zero >= stage else 1 for stage in (3, 2, 1)]
    assert held(found, BYTES[:3]) == [n // s for n, s in zip(held(whole, BYTES[:3]), shards, strict=True)]
    assert (found.gathered_bytes > 0) == (zero == 3)


def test_zero_3_gathers_the_largest_block(tiny):
    """Which is the one with the experts; a quarter of it is there anyway."""
    config = tiny(kv_lora_rank=16)
    deeper = count(tiny(kv_lora_rank=16, depth=3))
    block = deeper.weight_bytes - count(config).weight_bytes
    found = count(config, layout=Layout(data=4))
    assert found.gathered_bytes == block * 3 // 4
    assert found.memory_bytes == sum(held(found))


def test_tensor_parallelism_leaves_latents_norms_routers_and_experts_whole(tiny):
    config = tiny(q_lora_rank=8, heads=4)
    sizes = {name: p.numel() for name, p in Transformer(config).named_parameters()}
    kept = ("norm", "kv_a", ".q.0", ".q.1", "router", ".experts.")
    whole = sum(n for name, n in sizes.items() if any(word in name for word in kept))
    found = count(config, dtype="fp32", layout=Layout(tensor=4, zero=0))
    assert found.weight_bytes == 4 * (whole + (found.total - whole) // 4)


def test_experts_are_dealt_to_the_ranks_of_a_stage(tiny):
    """8 experts on 3 ranks: the fullest has 3."""
    config = tiny()
    expert = 3 * config.width * config.expert_width
    one, three = (count(config, layout=Layout(data=6, expert=e, zero=0)) for e in (1, 3))
    assert one.weight_bytes - three.weight_bytes == 2 * expert * (8 - 3)


def test_zero_shards_an_expert_over_the_ranks_that_hold_it(tiny):
    """Of 3 x 2 ranks those are 6 / 2 for each half of the 8 experts: 4 of them in 3 shards are as much as 8 in 6, but
    half as much is gathered. Tensor ranks, which hold the same experts, take part."""
    config = tiny()
    expert = 3 * config.width * config.expert_width
    one, two = (count(config, layout=Layout(data=3, tensor=2, expert=e)) for e in (1, 2))
    assert one.weight_bytes == two.weight_bytes
    assert one.gathered_bytes - two.gathered_bytes == 2 * expert * (8 - 4)
    dense = count(config, layout=Layout(data=3, tensor=2, zero=0)).weight_bytes - 2 * 8 * expert
    assert 0 <= one.weight_bytes - (dense / 3 + 2 * 8 * expert / 6) < 100  # rounding


def test_the_fullest_pipeline_stage_counts(tiny):
    """5 blocks over 2 stages: embedding and 3 blocks against 2 blocks, norm and head; with a larger block of MTP the
    last stage is the fullest."""
    config = tiny(depth=5, first_dense=0)
    norm, embedding = 2 * config.width, 2 * count(config).embedding
    block = count(tiny(depth=1, first_dense=0)).weight_bytes - 2 * embedding - norm
    two = Layout(pipeline=2)
    assert count(config, layout=two).weight_bytes == embedding + 3 * block
    mtp = count(config, mtp_layers=1).weight_bytes - count(config).weight_bytes
    assert count(config, layout=two, mtp_layers=1).weight_bytes == 2 * block + mtp + norm + embedding


def test_deepseek_v3s_own_layout():
    """16 stages, 64-way expert parallelism, ZeRO-1 over 128 ranks (2412.19437, section 3.2), bf16 moments (3.3.2): the
    first stage is the fullest, with the embedding, 3 dense blocks, and one with 4 of the 256 experts."""
    layout = Layout(data=128, pipeline=16, expert=64, zero=1)
    found = count(published("deepseek_v3"), layout=layout)
    attention, norms, expert, router = 187_107_328, 2 * 7168, 3 * 7168 * 2048, 256 * 7168
    dense = 3 * (attention + norms + 3 * 7168 * 18432) + attention + norms + expert + found.embedding
    assert layout.ranks == 2048
    assert found.weight_bytes == found.gradient_bytes == 2 * (dense + 4 * expert) + 4 * router
    # Two moments: experts are shared by 128 / 64 ranks, everything else by 128.
    assert found.optimizer_bytes == 2 * (2 * dense // 128 + 2 * 4 * expert // 2 + 4 * router // 128)
    assert found.gathered_bytes == 0


def test_the_table_names_every_number():
    found = count(published("deepseek_v3"), mtp_layers=1, optimizer="muon", layout=Layout(data=64, expert=64))
    text = found.table()
    wanted = (found.total, found.active, found.total - found.embedding, found.active - found.embedding - found.head)
    for number in (*wanted, found.mtp, found.flops, found.training_flops, found.kv_bytes, *held(found)):
        assert f"{number:,}" in text
    for word in ("70.27 kB", "83.49 GFLOP", "bf16, muon", "of 64", "4,096 tokens", "data=64", "expert=64", "zero=3"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "bf61"}, "unknown dtype 'bf61': did you mean 'bf16'"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"kv_dtype": "pf8"}, "unknown kv_dtype 'pf8': did you mean 'fp8'"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam': did you mean 'adamw'"),
        ({"seq_len": 97}, r"seq_len=97: valid 1\.\.96"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"mtp_layers": -1}, "mtp_layers=-1"),
        ({"layout": Layout(tensor=4)}, "tensor=4 does not divide model.heads=2"),
        ({"layout": Layout(pipeline=3)}, r"pipeline=3; valid 1\.\.2"),
        ({"layout": Layout(data=16, expert=16)}, r"expert=16; valid 1\.\.8"),
    ],
)
def test_mistakes(tiny, settings, said):
    with pytest.raises(ConfigError, match=said):
        count(tiny(), **settings)


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        ({"data": 0}, "data=0; must be at least 1"),
        ({"zero": 4}, "zero=4; valid: 0, 1, 2, 3"),
        ({"data": 4, "expert": 3}, "expert=3 does not divide data .* = 4"),
    ],
)
def test_impossible_layouts(degrees, said):
    with pytest.raises(ConfigError, match=said):
        Layout(**degrees)
