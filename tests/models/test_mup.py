"""muP's table row by row, the initial spread, and a coordinate check with a control that fails it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lit_reason.errors import ConfigError
from lit_reason.models import Base, ModelConfig, Transformer, parameter_roles
from lit_reason.models.attention import causal
from lit_reason.models.rope import rope_table
from lit_reason.optim import parameter_groups


def wide(width=128, depth=4) -> ModelConfig:
    """Everything that scales scales from width 64: at 128, heads 4 against 2 and so on."""
    m = width / 64
    return ModelConfig(
        width=width, depth=depth, heads=int(2 * m), q_lora_rank=int(32 * m), kv_lora_rank=int(16 * m),
        ffn_width=int(96 * m), expert_width=int(24 * m),
        base=Base(width=64, depth=4, heads=2, q_lora_rank=32, kv_lora_rank=16, ffn_width=96, expert_width=24),
    )  # fmt: skip


def test_the_table_at_twice_the_base_width():
    roles = parameter_roles(Transformer(wide()))
    hidden = ["attn.q.0.weight", "attn.q.2.weight", "attn.kv_a.weight", "attn.kv_b.weight", "attn.out.weight"]
    rows = {
        "embed.weight": ("embedding", 1.0, 0.0, 0.5),
        "norm.weight": ("norm", 1.0, 0.0, 0.5),
        "blocks.0.attn.kv_norm.weight": ("norm", 1.0, 0.0, 0.5),
        "blocks.0.ffn.down.weight": ("hidden", 0.5, 2.0, 0.5),
        "blocks.1.ffn.router.weight": ("router", 0.5, 2.0, 0.5),
        "blocks.1.ffn.experts.gate_up": ("expert", 0.5, 2.0, 0.5),
        "blocks.1.ffn.experts.down": ("expert", 0.5, 2.0, 0.5),
        "blocks.1.ffn.shared.gate_up.weight": ("hidden", 0.5, 2.0, 0.5),
        "head.weight": ("head", 0.5, 2.0, 1.0),
    } | {f"blocks.2.{name}": ("hidden", 0.5, 2.0, 0.5) for name in hidden}
    for name, (kind, lr, decay, eps) in rows.items():
        role = roles[name]
        assert (role.kind, role.lr, role.weight_decay, role.eps) == (kind, lr, decay, eps), name
    assert set(roles) == {name for name, _ in Transformer(wide()).named_parameters()}


def test_depth_enters_by_the_residual_scale_and_the_eps_of_blocks():
    roles = parameter_roles(Transformer(wide(depth=8)))
    assert roles["blocks.5.attn.out.weight"].eps == 1 / (2 * 2)
    assert roles["norm.weight"].eps == roles["embed.weight"].eps == 0.5
    assert roles["blocks.5.attn.out.weight"].lr == 0.5
    assert wide(depth=8).residual_scale == 0.5


def test_an_axis_that_the_base_does_not_name_is_not_scaled():
    roles = parameter_roles(Transformer(ModelConfig(width=128, base=Base(width=64))))
    assert roles["blocks.0.attn.kv_b.weight"].lr == 1.0  # fan-in is the latent's rank, the same at the base
    assert roles["blocks.0.attn.kv_a.weight"].lr == 0.5


def test_initial_spread():
    torch.manual_seed(0)
    model = Transformer(wide(width=256))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["head.weight"] == pytest.approx(math.sqrt(64) / 256, rel=0.02)
    assert std["embed.weight"] == pytest.approx(1.0, rel=0.02)
    assert std["blocks.1.ffn.experts.gate_up"] == pytest.approx(256**-0.5, rel=0.02)  # (E, out, in): in is last
    assert std["blocks.1.ffn.experts.down"] == pytest.approx(96**-0.5, rel=0.02)
    assert std["blocks.0.attn.q.2.weight"] == pytest.approx(128**-0.5, rel=0.02)
    assert std["blocks.1.ffn.router.weight"] == pytest.approx(256**-0.5, rel=0.05)
    assert (model.norm.weight == 1).all()


def test_branches_that_start_at_zero_leave_the_stream_alone_and_all_else_as_it_was():
    torch.manual_seed(0)
    silent = Transformer(replace(wide(), branch_gain=0.0))
    torch.manual_seed(0)
    plain = Transformer(wide())
    zero = {name for name, p in silent.named_parameters() if not p.any()}
    assert zero == {n for n, _ in plain.named_parameters() if n.endswith(("attn.out.weight", "down", "down.weight"))}
    for name, parameter in plain.named_parameters():
        assert name in zero or torch.equal(silent.get_parameter(name), parameter), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(silent.hidden(ids).states_BTD, silent.norm(silent.embed(ids)))


def test_the_spread_of_branches_is_a_factor():
    torch.manual_seed(0)
    model = Transformer(replace(wide(width=256), branch_gain=0.5))
    assert model.blocks[1].ffn.experts.down.std().item() == pytest.approx(0.5 * 96**-0.5, rel=0.02)
    assert model.blocks[0].attn.out.weight.std().item() == pytest.approx(0.5 * 256**-0.5, rel=0.02)
    with pytest.raises(ConfigError, match=r"model.branch_gain=-1.0: valid a number, 0 or above"):
        replace(wide(), branch_gain=-1.0)


def test_the_residual_scale_is_applied_to_both_branches():
    torch.manual_seed(0)
    deep = Transformer(ModelConfig(width=32, depth=2, heads=2, base=Base(width=32, depth=1))).eval()
    block, x = deep.blocks[1], torch.randn(1, 6, 32)
    with torch.no_grad():
        rotation = rope_table(deep.config, x.device)[:6]
        middle = x + 0.5 * block.attn(block.attn_norm(x), rotation, causal)
        expected = middle + 0.5 * block.ffn(block.ffn_norm(middle))[0]
        torch.testing.assert_close(block(x, rotation, causal)[0], expected)


def change_of_hidden_states(ladder, width: int, mup: bool) -> float:
    """RMS change of the last hidden states after 3 Adam steps on one batch."""
    torch.manual_seed(0)
    model = Transformer(ladder(width))
    model.embed.weight.requires_grad_(False)  # its change has slope 0 in both and would dilute the control
    groups = parameter_groups(model, lr=2**-11, weight_decay=0.0, eps=1e-12)
    if not mup:
        groups = [group | {"lr": 2**-11} for group in groups]
    optimizer = torch.optim.Adam(groups)
    ids = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(1))
    before = model.hidden(ids[:, :-1]).states_BTD.detach()
    for _ in range(3):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model.hidden(ids[:, :-1]).states_BTD - before).square().mean().sqrt().item()


def slope(values: list[float]) -> float:
    """Least squares slope of log2(value) over three doublings of the width."""
    return (math.log2(values[-1]) - math.log2(values[0])) / 2


def test_coordinates_move_the_same_at_every_width_and_not_without_mup(ladder):
    widths = (32, 64, 128)
    mup = slope([change_of_hidden_states(ladder, w, mup=True) for w in widths])
    control = slope([change_of_hidden_states(ladder, w, mup=False) for w in widths])
    assert abs(mup) <= 0.25
    assert control >= 0.4
