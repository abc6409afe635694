"""The coordinate check's two measures against numbers worked out by hand, and that they tell right rules from wrong."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_reason.models import Transformer, parameter_roles
from lit_reason.models.coord import CoordinateProbe, by_kind, rms, slope
from lit_reason.models.rope import rope_table

IDS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return Transformer(tiny(q_lora_rank=8, depth=2))


def probe(model) -> CoordinateProbe:
    return CoordinateProbe(model, lambda: model(IDS))


def inputs_of(model, module) -> torch.Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(IDS)
    handle.remove()
    return seen[0]


def test_slope_is_the_least_squares_line_in_log2():
    assert slope([64, 128, 256], [1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert slope([64, 128, 256], [8.0, 4.0, 8.0]) == pytest.approx(0.0)
    # points (6, 0), (7, 0), (8, 1), (9, 1): sum of (x - 7.5)(y - 0.5) = 2, of (x - 7.5)^2 = 5
    assert slope([64, 128, 256, 512], [1.0, 1.0, 2.0, 2.0]) == pytest.approx(2 / 5)
    assert math.isnan(slope([64, 128], [0.0, 1.0])) and math.isnan(slope([64, 128], [math.inf, 1.0]))


def test_kinds_are_root_mean_squares_over_modules():
    assert by_kind({"q/blocks.0.attn": 3.0, "q/blocks.1.attn": 1.0, "k/x": 2.0}) == {"q": math.sqrt(5), "k": 2.0}


def test_nothing_moves_before_training(model):
    found = probe(model).measure()
    assert set(found.change.values()) == set(found.update.values()) == {0.0}


def test_every_matrix_and_quantity_has_a_place(model):
    found = probe(model).measure()
    attention = {"q", "latent", "k", "v", "attn_logits", "attn_out"}
    rest = {"embedding", "ffn_out", "residual", "router_logits", "head_logits"}
    assert set(by_kind(found.change)) == attention | rest
    projections = {"W_DQ", "W_UQ", "W_DKV", "W_KR", "W_UK", "W_UV", "W_O"}
    ffn = {f"{kind}_{part}" for kind in ("ffn", "shared", "expert") for part in ("gate", "up", "down")}
    assert set(by_kind(found.update)) == projections | ffn | {"embedding", "router", "head"}
    assert {name for name in found.change if name.startswith("q/")} == {"q/blocks.0.attn", "q/blocks.1.attn"}


@torch.no_grad()
def test_the_update_of_each_block_of_a_fused_matrix(model):
    """kv_b moves in its value rows only, kv_a in its rotary rows only: by a known amount."""
    watch, attn = probe(model), model.blocks[1].attn
    rows = attn.kv_b.weight.view(attn.heads, attn.nope + attn.value, -1)
    rows[:, attn.nope :] += 0.01
    attn.kv_a.weight[attn.latent :] -= 0.02
    update = watch.measure().update
    latent, x = inputs_of(model, attn.kv_b), inputs_of(model, attn.kv_a)
    # every row of the change is constant: (W_t - W_0) x = 0.01 * sum(x)
    assert update["W_UV/blocks.1.attn.kv_b"] == pytest.approx(rms(0.01 * latent.sum(-1)), rel=1e-4)
    assert update["W_KR/blocks.1.attn.kv_a"] == pytest.approx(rms(0.02 * x.sum(-1)), rel=1e-4)
    assert update["W_UK/blocks.1.attn.kv_b"] == update["W_DKV/blocks.1.attn.kv_a"] == 0.0


@torch.no_grad()
def test_the_update_of_experts_is_that_of_the_chosen_ones(model):
    """Every expert's `down` grows by a tenth: the update of a (token, choice) is a tenth of what that expert said."""
    watch, moe = probe(model), model.blocks[1].ffn
    before = moe.experts.down.clone()
    moe.experts.down *= 1.1
    update = watch.measure().update
    x_ND = inputs_of(model, moe).flatten(0, 1)
    said = []
    for n, experts in enumerate(moe.router(x_ND).experts_NK.tolist()):
        for e in experts:
            gate, up = (moe.experts.gate_up[e] @ x_ND[n]).chunk(2)
            said.append(before[e] @ (F.silu(gate) * up))
    assert update["expert_down/blocks.1.ffn.experts"] == pytest.approx(0.1 * rms(torch.stack(said)), rel=1e-4)
    assert update["expert_gate/blocks.1.ffn.experts"] == 0.0


@torch.no_grad()
def test_change_is_that_of_the_whole_network_below(model):
    """A moved embedding changes the logits, although the head's own updates are 0."""
    watch = probe(model)
    before = model.eval()(IDS)
    model.embed.weight += 0.1 * torch.randn(40, 32)
    found = watch.measure()
    assert found.change["head_logits/head"] == pytest.approx(rms(model(IDS) - before), rel=1e-5)
    assert found.update["head/head"] == 0.0 and found.update["embedding/embed"] == found.change["embedding/embed"] > 0


@torch.no_grad()
def test_attention_logits_are_those_of_seen_tokens(model):
    """With doubled queries the logits' change is the logits themselves."""
    watch, attn, T = probe(model), model.blocks[0].attn, IDS.shape[1]
    logits = []

    def keep(q_BTHd, k_BTHd, v_BTHd, scale):
        logits.append(torch.einsum("bthd,bshd->bhts", q_BTHd, k_BTHd) * scale)
        return v_BTHd

    attn(inputs_of(model, attn), rope_table(model.config, IDS.device)[:T], keep)
    attn.q[2].weight *= 2
    expected = rms(logits[0][..., torch.ones(T, T).tril().bool()])
    assert watch.measure().change["attn_logits/blocks.0.attn"] == pytest.approx(expected, rel=1e-4)


def test_a_measurement_leaves_no_trace(model):
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    probe(model).measure()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off_and_random_numbers_are_put_back():
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0 * torch.rand(1)

    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), Noise(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    watch = CoordinateProbe(net, lambda: net(x))
    torch.rand(1)
    random = torch.get_rng_state()
    assert set(watch.measure().change.values()) == {0.0}
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_is_not_ours_is_measured_by_role():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 5, bias=False))
    ids = torch.arange(5)
    watch = CoordinateProbe(net, lambda: net(ids))
    with torch.no_grad():
        net[1].weight += 1.0
    found = watch.measure()
    assert set(found.update) == {"other/0", "matrix/1", "matrix/3"}
    assert found.update["matrix/1"] == pytest.approx(rms(net[0].weight.sum(-1)), rel=1e-5)
    assert found.update["other/0"] == 0.0 and found.change["matrix/3"] > 0


def updates_at(ladder, width: int, wrong: str | None) -> dict[str, float]:
    """Effective updates after 2 Adam steps; the role `wrong` keeps the base width's learning rate."""
    torch.manual_seed(0)
    model = Transformer(ladder(width))
    roles = parameter_roles(model)
    roles = {name: replace(role, lr=1.0) if role.kind == wrong else role for name, role in roles.items()}
    lr = 2**-10
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr * roles[n].lr} for n, p in model.named_parameters()], eps=0)
    ids = torch.randint(0, 64, (1, 17), generator=torch.Generator().manual_seed(1))
    watch = CoordinateProbe(model, lambda: model(ids[:, :-1]))
    for _ in range(2):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return by_kind(watch.measure().update)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (None, set()),
        ("router", {"router"}),
        ("head", {"head"}),
        ("expert", {"expert_gate", "expert_up", "expert_down"}),
    ],
)
def test_a_role_whose_rate_is_not_divided_by_the_width_is_found_out(ladder, wrong, found):
    widths = (32, 64, 128)
    values = [updates_at(ladder, width, wrong) for width in widths]
    slopes = {kind: slope(widths, [value[kind] for value in values]) for kind in values[0]}
    assert {kind for kind, value in slopes.items() if value > 0.4} == found
