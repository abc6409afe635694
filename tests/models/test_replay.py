"""Router replay: given experts in the trainer's forward, against a dense loop, finite differences and itself."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from lit_reason.errors import RolloutError
from lit_reason.models import HFModel, Transformer
from lit_reason.models.attention import causal
from lit_reason.models.moe import MoE, Router
from lit_reason.models.packing import pack
from lit_reason.models.rope import rope_table

P1, P2 = [5, 6, 7], [5, 6, 8, 9, 4]
ROWS = [(P1, [1, 2, 3, 4]), (P2, [1]), (P1, [9]), (P2, [2, 2, 2, 2, 2, 2]), (P1, [1, 2])]
V2 = {"scoring": "softmax", "group_score": "max", "norm_topk_prob": False, "routed_scale": 4.0}
VARIANTS = {
    "v3": {"routed_scale": 2.5},
    "v3 in groups": {"expert_groups": 4, "groups_per_token": 1, "routed_scale": 2.5},
    "v3 not normalised": {"norm_topk_prob": False},
    "v2": V2,
    "v2 in groups": V2 | {"expert_groups": 4, "groups_per_token": 2},
}
L, E, K = 2, 8, 2  # MoE layers of a trunk of three, whose first is dense


def batch(rows=ROWS):
    T = max(len(p) + len(c) for p, c in rows) - 1
    ids, counts = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(rows):
        whole = prompt + completion
        ids[b, : len(whole) - 1] = torch.tensor(whole[:-1])
        counts[b, len(prompt) - 1 : len(whole) - 1] = True
    return ids, counts


def some_experts(ids_BT, seed=0):
    """Any experts; those of a prompt are the same in all rows, as an engine that reads it once tells them."""
    draw = torch.Generator().manual_seed(seed)
    experts = torch.rand(*ids_BT.shape, L, E, generator=draw).topk(K, dim=-1).indices.to(torch.int16)
    for b, (prompt, _) in enumerate(ROWS):
        first = [p for p, _ in ROWS].index(prompt)
        experts[b, : len(prompt)] = experts[first, : len(prompt)]
    return experts


def build(tiny, variant="v3", dtype=torch.float64):
    """Scores that differ by tenths, biases that change the choice; in float64 all over, the router too."""
    torch.manual_seed(0)
    model = Transformer(tiny(depth=3, shared_experts=1, **VARIANTS[variant])).train().to(dtype)
    for router in model.routers():
        router.weight.data = router.weight.data.to(dtype) * 3
        router.bias_E = (0.2 * torch.randn(E)).to(dtype) if "v3" in variant else router.bias_E.to(dtype)
    return model


def own_choice(model, ids_BT):
    """experts_BTLK that the padded forward takes by itself."""
    seen = []
    hooks = [r.register_forward_hook(lambda m, a, out: seen.append(out.experts_NK)) for r in model.routers()]
    with torch.no_grad():
        model.hidden(ids_BT)
    for hook in hooks:
        hook.remove()
    return torch.stack([x.view(*ids_BT.shape, -1) for x in seen], 2).to(torch.int16)


def dense_loop(model, ids_BT, experts_BTLK):
    """states_BTD of the padded rows; every expert runs on every token, and the chosen ones are added up."""
    config, rotation = model.config, rope_table(model.config, ids_BT.device)[: ids_BT.shape[1]]
    x, layer = model.embed(ids_BT), 0
    for block in model.blocks:
        x = x + block.scale * block.attn(block.attn_norm(x), rotation, causal)
        h = block.ffn_norm(x)
        if not isinstance(block.ffn, MoE):
            x = x + block.scale * block.ffn(h)
            continue
        logits = h @ block.ffn.router.weight.t()
        scores = logits.softmax(-1) if config.scoring == "softmax" else 1 / (1 + (-logits).exp())
        chosen = F.one_hot(experts_BTLK[:, :, layer].long(), E).sum(2)
        weights = scores * chosen
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        out = block.ffn.shared(h)
        for e in range(E):
            gate, up = (h @ block.ffn.experts.gate_up[e].t()).chunk(2, dim=-1)
            expert = (gate / (1 + (-gate).exp()) * up) @ block.ffn.experts.down[e].t()
            out = out + config.routed_scale * weights[..., e : e + 1] * expert
        x, layer = x + block.scale * out, layer + 1
    return model.norm(x)


def gradients(model, out):
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    named = {n: p for n, p in model.named_parameters() if not n.startswith("head")}
    return dict(zip(named, torch.autograd.grad((out * target).sum(), list(named.values())), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_routers_own_experts_change_nothing_bit_for_bit(tiny, variant):
    model = build(tiny, variant, torch.float32)
    ids_BT, counts_BT = batch()
    experts = own_choice(model, ids_BT)
    plain, replayed = (model.states_at(ids_BT, counts_BT, given) for given in (None, experts))
    assert torch.equal(model.head(plain), model.head(replayed))
    expected, got = gradients(model, plain), gradients(model, replayed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [r.take_replays().tolist() for r in model.routers()] == [[0, 17]] * L  # the tokens of `ROWS`, packed


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_experts_give_the_states_and_gradients_of_a_dense_loop(tiny, variant):
    model = build(tiny, variant)
    ids_BT, counts_BT = batch()
    experts = some_experts(ids_BT)
    assert (own_choice(model, ids_BT).sort(-1).values != experts.sort(-1).values).any(-1).float().mean() > 0.5
    got = model.states_at(ids_BT, counts_BT, experts)
    expected = dense_loop(model, ids_BT, experts)[counts_BT]
    torch.testing.assert_close(model.head(got), model.head(expected), atol=1e-10, rtol=0)
    assert (model.states_at(ids_BT, counts_BT) - got).abs().max() > 1e-2
    ours, theirs = gradients(model, got), gradients(model, expected)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", ["v3", "v2 in groups"])
def test_the_routers_gradient_is_that_of_finite_differences(tiny, variant):
    """Of weights that are 0 unless the router itself chose the expert, this gradient would be 0."""
    model = build(tiny, variant)
    ids_BT, counts_BT = batch()
    experts = some_experts(ids_BT, seed=3)  # far from the routers' own choice
    target = torch.randn(int(counts_BT.sum()), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss():
        return (model.states_at(ids_BT, counts_BT, experts) * target).sum()

    for router in model.routers():
        (gradient,) = torch.autograd.grad(loss(), router.weight)
        assert (gradient.norm(dim=1) > 1e-3).sum() >= 6  # of 8 experts that 17 tokens drew two of each
        for e, d in ((0, 3), (4, 17), (7, 31), divmod(int(gradient.abs().argmax()), 32)):
            sides = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    router.weight[e, d] += step
                    sides.append(loss().item())
                    router.weight[e, d] -= step
            assert gradient[e, d].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-7)


def test_unknown_tokens_take_the_routers_own_experts(tiny):
    router = Router(tiny(**V2))
    torch.nn.init.normal_(router.weight)
    x_ND = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    own = router(x_ND)
    given = torch.tensor([[-1, -1], [3, 1], [-1, -1], [5, -1], [6, 7], [-1, -1]], dtype=torch.int16)
    found = router(x_ND, given)
    assert torch.equal(found.experts_NK[[0, 2, 3, 5]], own.experts_NK[[0, 2, 3, 5]])  # half a selection is none
    assert found.experts_NK[[1, 4]].tolist() == [[3, 1], [6, 7]]
    assert torch.equal(found.weights_NK[1], own.scores_NE[1, [3, 1]] * 4.0)
    nothing = router(x_ND, torch.full_like(given, -1))
    assert torch.equal(nothing.experts_NK, own.experts_NK) and torch.equal(nothing.weights_NK, own.weights_NK)


def test_what_is_counted_is_what_was_computed(tiny):
    """Other experts for two tokens in the last layer, so that every other choice stays the routers' own."""
    model = build(tiny, dtype=torch.float32)
    ids_BT, counts_BT = batch()
    own = own_choice(model, ids_BT)
    actual = own.clone()
    actual[0, :2, 1] = torch.stack([(own[0, :2, 1, 0] + 1) % E, (own[0, :2, 1, 0] + 3) % E], -1)
    actual[[2, 4], :2] = actual[0, :2]  # the rows that share this prompt
    given = actual.flip(-1).clone()  # the order of a token's experts is no difference
    given[0, 4] = -1  # a token of row 0 alone
    model.states_at(ids_BT, counts_BT, given).sum().backward()
    computed_NLK = pack(ids_BT, counts_BT, actual).experts_NLK
    assert computed_NLK.shape == (17, L, K)
    for layer, router in enumerate(model.routers()):
        assert torch.equal(router.load_E, torch.bincount(computed_NLK[:, layer].flatten().long(), minlength=E).float())
        assert router.take_replays().tolist() == [2 * layer, 16]
    with torch.no_grad():
        model.states_at(ids_BT, counts_BT, given)
    assert all(router.take_replays() is None for router in model.routers())  # counted in training alone


def test_packed_tokens_keep_their_experts_and_a_prompts_are_of_the_first_row_that_knows_them():
    ids_BT, counts_BT = batch()
    at = torch.arange(ids_BT.numel()).view(ids_BT.shape)
    experts = torch.stack((at, at + 500), -1)[:, :, None].expand(-1, -1, L, -1).to(torch.int16).clone()
    experts[0, :2] = -1  # row 0 does not know P1's first two tokens; rows 2 and 4 share them
    experts[[0, 2, 4], 2] = -1  # nobody knows its third
    experts[1] = -1  # P2's first row knows nothing
    packed = pack(ids_BT, counts_BT, experts)
    T = ids_BT.shape[1]
    prompts = [2 * T, 2 * T + 1, -1, *(3 * T + t for t in range(5))]
    own = [3, 4, 5, *(3 * T + 5 + t for t in range(5)), 4 * T + 3]
    assert packed.experts_NLK[:, 1, 0].tolist() == prompts + own
    known = packed.experts_NLK[:, 0, 1] >= 0
    assert torch.equal(packed.experts_NLK[known, 0, 1], packed.experts_NLK[known, 0, 0] + 500)
    without = counts_BT.clone()
    without[[2, 3]] = False  # rows that are left out tell nothing
    assert pack(ids_BT, without, experts).experts_NLK[:8, 0, 0].tolist() == [4 * T, 4 * T + 1, -1, *[-1] * 5]


def test_packed_equals_row_by_row(tiny):
    model = build(tiny)
    ids_BT, counts_BT = batch()
    experts = some_experts(ids_BT, seed=2)
    experts[3, 6:8, 0] = -1
    together = model.states_at(ids_BT, counts_BT, experts)
    rows = [model.states_at(ids_BT[b, None], counts_BT[b, None], experts[b, None]) for b in range(len(ROWS))]
    torch.testing.assert_close(together, torch.cat(rows), atol=1e-12, rtol=0)
    nothing = model.states_at(ids_BT, torch.zeros_like(counts_BT), experts)
    assert nothing.shape == (0, 32) and nothing.requires_grad


def test_experts_of_another_architecture_are_refused(tiny):
    model = build(tiny, dtype=torch.float32)
    ids_BT, counts_BT = batch()
    experts = some_experts(ids_BT)
    for wrong in (experts[:, :, :1], experts[:, 1:], experts[..., :1], experts.repeat(1, 1, 2, 1)):
        with pytest.raises(RolloutError, match=r"this model takes \(5, 10, 2, 2\)"):
            model.states_at(ids_BT, counts_BT, wrong)
    experts[2, 0, 1, 0] = 8
    with pytest.raises(RolloutError, match=r"expert 8 .* 0\.\.7"):
        model.states_at(ids_BT, counts_BT, experts)


def test_a_model_of_transformers_says_once_that_it_cannot_replay():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    lm = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        )
    )  # fmt: skip
    model = HFModel(lm)
    ids_BT, counts_BT = batch()
    with pytest.warns(UserWarning, match="Qwen3MoeForCausalLM of transformers cannot replay"):
        given = model.states_at(ids_BT, counts_BT, some_experts(ids_BT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(given, model.states_at(ids_BT, counts_BT, some_experts(ids_BT)))
        assert torch.equal(given, model.states_at(ids_BT, counts_BT))
