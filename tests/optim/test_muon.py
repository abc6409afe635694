"""Muon against torch's, per-matrix orthogonalisation against singular values, MARS-M against its formula."""

import math

import pytest
import torch
from torch import nn

from lit_reason.errors import ConfigError
from lit_reason.models.mup import Matrices, Matrix, parameter_roles
from lit_reason.optim import MarsM, Muon
from lit_reason.optim.muon import MuonOptimizer, newton_schulz

# What five steps of the quintic make of singular values from 0.01 to 1 (Jordan et al.: about 0.7 to 1.2).
LOW, HIGH = 0.65, 1.25


def whole(p):
    return Matrices(1, (Matrix("matrix", p.shape[-2], p.shape[-1], p.shape[-2], p.shape[-1]),))


def muon(p, **kwargs):
    return MuonOptimizer([{"params": [p]}], {p: whole(p)}, ns_dtype=torch.float32, **kwargs)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equal_to_torch_on_two_dimensions(shape, nesterov, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t.clone())  # torch's Newton-Schulz, in float32
    lr, decay, factor = 0.05, 0.2, math.sqrt(shape[0] / shape[1])
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    # torch multiplies the rate by sqrt(max(1, out / in)) and decays by the rate without it
    short = min(1.0, factor)
    reference = torch.optim.Muon([theirs], lr=lr * short, weight_decay=decay / short, nesterov=nesterov)
    optimizer = muon(ours, lr=lr, weight_decay=decay, nesterov=nesterov)
    for _ in range(50):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_of_a_stack_is_orthogonalised_by_itself(dtype):
    torch.manual_seed(0)
    stack = torch.randn(3, 2, 6, 10) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
    kept = stack.clone()
    out = newton_schulz(stack, dtype=dtype)
    assert out.dtype == dtype and torch.equal(stack, kept)
    values = torch.linalg.svdvals(out.float())
    assert values.min() > LOW and values.max() < HIGH
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for e in range(3):
        for r in range(2):
            torch.testing.assert_close(out[e, r], newton_schulz(stack[e, r], dtype=dtype), atol=tolerance, rtol=0)


def test_singular_vectors_are_kept_and_zeros_stay_zero():
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(7, 5), full_matrices=False)
    rotated = u.mT @ newton_schulz((u * torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05])) @ vt, dtype=torch.float32) @ vt.mT
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-5
    assert newton_schulz(torch.zeros(2, 4, 3)).count_nonzero() == 0


def test_the_momentum_is_not_normalised_in_place():
    # torch 2.13's does so with bfloat16 parameters and no Nesterov
    p = nn.Parameter(torch.randn(4, 4).bfloat16())
    optimizer = MuonOptimizer([{"params": [p]}], {p: whole(p)}, nesterov=False)
    p.grad = torch.full((4, 4), 8.0).bfloat16()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], torch.full((4, 4), 8 * 0.05).bfloat16())


def expected_blocks(config, name, w):
    """{(label): matrix} of a weight, cut by hand as the forward pass reads it."""
    n, r, v, h = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.heads
    if name.endswith("attn.q.2.weight"):
        return [w[i * (n + r) : (i + 1) * (n + r)] for i in range(h)]
    if name.endswith("kv_a.weight"):
        return [w[: config.kv_lora_rank], w[config.kv_lora_rank :]]
    if name.endswith("kv_b.weight"):
        starts = [i * (n + v) for i in range(h)]
        return [w[s : s + n] for s in starts] + [w[s + n : s + n + v] for s in starts]
    if name.endswith("experts.gate_up"):
        return [half for expert in w for half in expert.chunk(2)]
    if name.endswith("gate_up.weight"):
        return list(w.chunk(2))
    return list(w) if name.endswith("experts.down") else [w]


def test_a_step_of_the_model_is_orthogonal_per_matrix_with_muPs_factor(make_model, set_gradients):
    model = make_model()
    roles = parameter_roles(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _ = Muon(lr=0.5, weight_decay=0.0, ns_dtype="float32").build(model, 10)
    set_gradients(model)
    optimizer.step()
    seen = 0
    for name, p in model.named_parameters():
        if roles[name].kind not in ("hidden", "expert"):
            continue
        blocks = expected_blocks(model.config, name, p.detach() - before[name])
        assert sum(block.numel() for block in blocks) == p.numel()
        for block in blocks:
            values = torch.linalg.svdvals(block) / (0.5 * math.sqrt(block.shape[0] / block.shape[1]))
            assert values.min() > LOW and values.max() < HIGH, name
            seen += 1
    # per layer: q_a, 2 q heads, 2 of kv_a, 2 x 2 of kv_b, out; a dense layer's 3; 4 experts' 3 each and the shared 3
    assert seen == 2 * 10 + 3 + 15


def test_the_named_rows_are_what_the_forward_pass_makes_of_them(make_model):
    model = make_model()
    roles, attn = parameter_roles(model), model.blocks[0].attn
    x = torch.randn(1, 5, 32)
    _, value = roles["blocks.0.attn.kv_b.weight"].matrices.split(attn.kv_b.weight.detach())
    latent, key_rope = roles["blocks.0.attn.kv_a.weight"].matrices.split(attn.kv_a.weight.detach())
    value.zero_()
    k_nope, v = attn.kv_b(torch.randn(3, 8)).unflatten(-1, (2, -1)).split((6, 10), dim=-1)
    assert v.count_nonzero() == 0 and k_nope.count_nonzero() > 0
    key_rope.zero_()
    parts = attn.kv_a(x).split((8, 4), dim=-1)
    assert parts[1].count_nonzero() == 0 and parts[0].count_nonzero() > 0
    assert latent.shape == (1, 8, 32)


def test_adamw_keeps_embedding_head_norms_and_router(make_model):
    model = make_model(width=64)
    optimizer, _ = Muon(lr=0.5, adamw_lr=0.01).build(model, 10)
    muon_part, adamw_part = optimizer.parts
    rates = {group["name"].split("/")[0]: group["lr"] for group in adamw_part.param_groups}
    assert rates == {"embedding": 0.01, "norm": 0.01, "router": 0.005, "head": 0.005}  # width 2 x the base's
    assert {(g["name"], g["lr"]) for g in muon_part.param_groups} == {("hidden", 0.5), ("expert", 0.5)}
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}


def test_decay_goes_by_the_rate_without_the_shapes_factor(make_model):
    model = make_model(width=64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, _ = Muon(lr=0.5, weight_decay=0.1).build(model, 10)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        if parameter_roles(model)[name].kind in ("hidden", "expert"):
            torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * 0.1))


def test_mars_corrects_by_the_formula():
    """gamma mu / (1 - mu) = 0.1 x 9: c2 = g2 + 0.9 (g2 - g1), momentum 0.1 c1 and then 0.9 x that + 0.1 c2."""
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = muon(p, momentum=0.9, mars_gamma=0.1)
    g1, g2 = torch.tensor([[0.1, 0.0], [0.2, -0.1]]), torch.tensor([[0.2, 0.1], [0.0, 0.3]])
    p.grad = g1.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.1 * g1)
    p.grad.copy_(g2)  # the same memory, as with zero_grad(set_to_none=False)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.09 * g1 + 0.1 * (g2 + 0.9 * (g2 - g1)))
    assert torch.equal(p.grad, g2)


def test_mars_shortens_each_matrix_alone():
    p = nn.Parameter(torch.zeros(2, 3, 3))  # two experts, the first with a gradient of norm 30
    optimizer = muon(p, momentum=0.9, mars_gamma=0.1)
    p.grad = torch.stack((torch.full((3, 3), 10.0), torch.full((3, 3), 0.1)))
    optimizer.step()
    expected = torch.stack((torch.full((3, 3), 1 / 3), torch.full((3, 3), 0.1)))
    torch.testing.assert_close(optimizer.state[p]["momentum"], 0.1 * expected)


def test_a_hugging_face_head_is_no_matrix():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.out

    matrices = {name for name, role in parameter_roles(Foreign()).items() if role.matrices}
    assert matrices == {"mix.weight"}
    assert {name for name, r in parameter_roles(nn.Sequential(Foreign())).items() if r.matrices} == {"0.mix.weight"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Muon(lr=0), r"optimizer\.lr=0: must be above 0"),
        (lambda: Muon(adamw_lr=-1), r"optimizer\.adamw_lr=-1: must be above 0"),
        (lambda: Muon(momentum=1), r"optimizer\.momentum=1: must be at least 0 and below 1"),
        (lambda: Muon(ns_steps=0), r"optimizer\.ns_steps=0: must be at least 1"),
        (lambda: Muon(ns_dtype="bflot16"), r"optimizer\.ns_dtype='bflot16': did you mean 'bfloat16'"),
        (lambda: Muon(schedule="cosin"), r"optimizer\.schedule='cosin': did you mean 'cosine'"),
        (lambda: MarsM(gamma=0), r"optimizer\.gamma=0: must be above 0"),
    ],
)
def test_wrong_values_are_refused_before_there_is_a_model(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
