"""Routing by brute force, dispatch against a loop, balancing by hand."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from lit_reason.models import Transformer
from lit_reason.models.moe import MoE, Router, deal, sequence_balance


def router_with(config, bias) -> Router:
    """A router whose scores are the sigmoid of its input's first E entries."""
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(config.experts, config.width))
        router.bias_E.copy_(torch.tensor(bias))
    return router


def brute_force(scores, bias, groups, kept, k, best_of=2) -> set[int]:
    """The k best experts of the `kept` best groups, found by trying every set; a group is its `best_of` best."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    value = [sum(sorted((biased[i] for i in m), reverse=True)[:best_of]) for m in members]
    best = max(itertools.combinations(range(groups), kept), key=lambda gs: sum(value[g] for g in gs))
    allowed = [i for g in best for i in members[g]]
    return set(max(itertools.combinations(allowed, k), key=lambda es: sum(biased[i] for i in es)))


@pytest.mark.parametrize("bias", [[0.0] * 8, [-2, -1.5, -3, -2.5, -1, -2, -1.2, -4], [0.5, -0.5, 0, 0, 0.2, -1, 0, 1]])
@pytest.mark.parametrize(("groups", "kept", "k"), [(1, 1, 3), (4, 1, 2), (4, 2, 3), (2, 1, 3)])
def test_selection_equals_brute_force(tiny, bias, groups, kept, k):
    config = tiny(expert_groups=groups, groups_per_token=kept, experts_per_token=k, routed_scale=2.5)
    router = router_with(config, bias)
    x_ND = torch.randn(50, 32, generator=torch.Generator().manual_seed(k))
    routing = router(x_ND)
    for n in range(50):
        scores = x_ND[n, :8].sigmoid()
        chosen = routing.experts_NK[n].tolist()
        assert set(chosen) == brute_force(scores.tolist(), bias, groups, kept, k)
        # Weights are the scores *without* the bias, normalised over the chosen, times the scale.
        expected = scores[chosen] / scores[chosen].sum() * 2.5
        torch.testing.assert_close(routing.weights_NK[n], expected)


def test_a_group_is_judged_by_its_two_best_and_dropped_groups_never_win(tiny):
    config = tiny(expert_groups=2, groups_per_token=1, experts_per_token=3)
    logits = torch.tensor([[3.0, -9, -9, -9, 1.0, 1.0, -9, -9]])  # best single expert in the group that loses
    x_ND = F.pad(logits, (0, 24))
    assert set(router_with(config, [0.0] * 8)(x_ND).experts_NK[0].tolist()) - {6, 7} == {4, 5}
    # Every biased score of the kept group is below 0, which a mask of 0 instead of -inf would lose against.
    negative = router_with(config, [-5.0] * 4 + [-3.0] * 4)(x_ND)
    assert all(e >= 4 for e in negative.experts_NK[0].tolist())


@pytest.mark.parametrize(("groups", "kept", "k"), [(1, 1, 3), (4, 2, 3), (8, 3, 2)])  # greedy, V2's, 1 expert a group
def test_v2_takes_softmax_scores_as_weights_from_the_groups_with_the_best_expert(tiny, groups, kept, k):
    config = tiny(
        expert_groups=groups, groups_per_token=kept, experts_per_token=k, routed_scale=16.0,
        scoring="softmax", group_score="max", norm_topk_prob=False,
    )  # fmt: skip
    router = router_with(config, [0.0] * 8)
    x_ND = torch.randn(50, 32, generator=torch.Generator().manual_seed(k))
    routing = router(x_ND)
    assert torch.equal(routing.scores_NE, x_ND[:, :8].softmax(-1))
    for n in range(50):
        scores, chosen = routing.scores_NE[n], routing.experts_NK[n].tolist()
        assert set(chosen) == brute_force(scores.tolist(), [0.0] * 8, groups, kept, k, best_of=1)
        assert torch.equal(routing.weights_NK[n], scores[chosen] * 16.0)


def test_the_best_expert_wins_its_group_a_place_where_two_good_ones_would_not(tiny):
    x_ND = F.pad(torch.tensor([[3.0, -9, -9, -9, 2.5, 2.5, -9, -9]]), (0, 24))
    groups = {"expert_groups": 2, "groups_per_token": 1, "experts_per_token": 1}
    chosen = {s: router_with(tiny(**groups, group_score=s), [0.0] * 8)(x_ND).experts_NK.item() for s in ("max", "top2")}
    assert chosen["max"] == 0 and chosen["top2"] in (4, 5)


def test_weights_that_are_not_normalised_are_the_scores_times_the_scale(tiny):
    config = tiny(norm_topk_prob=False, routed_scale=2.5)
    routing = router_with(config, [0.3, -0.2, 0, 0, 0, 0, 0.1, 0])(torch.randn(20, 32))
    assert torch.equal(routing.weights_NK, routing.scores_NE.gather(1, routing.experts_NK) * 2.5)


@pytest.mark.parametrize("skew", [0.0, 5.0])
def test_dispatch_equals_a_loop_over_experts_with_gradients(tiny, skew):
    torch.manual_seed(0)
    moe = MoE(tiny(shared_experts=0, routed_scale=1.5)).train()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    moe.router.bias_E[2] = skew  # 5: every token goes to expert 2, a full block beside empty ones
    x_ND = torch.randn(37, 32, requires_grad=True)
    routing = moe.router(x_ND)
    loop = torch.zeros(37, 32)
    for n in range(37):
        for j, e in enumerate(routing.experts_NK[n].tolist()):
            gate, up = (moe.experts.gate_up[e] @ x_ND[n]).split(16)
            loop[n] = loop[n] + routing.weights_NK[n, j] * (moe.experts.down[e] @ (F.silu(gate) * up))
    wanted = [x_ND, *moe.parameters()]
    target = torch.randn(37, 32)
    expected = torch.autograd.grad((loop * target).sum(), wanted, retain_graph=True)
    out = moe.experts(x_ND, routing)
    got = torch.autograd.grad((out * target).sum(), wanted)
    torch.testing.assert_close(out, loop, atol=1e-5, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("N", [1, 5, 300])
def test_deal_gives_every_choice_its_own_slot_in_its_expert(N):
    generator = torch.Generator().manual_seed(N)
    experts_NK = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(N)])
    experts_NK[: N // 2, 0] = 5  # crowd one expert
    experts_NK[: N // 2, 1] = 0
    slot_NK, token_EC = deal(experts_NK, 6)
    capacity = token_EC.numel() // 6
    assert slot_NK.unique().numel() == 2 * N
    assert torch.equal(slot_NK // capacity, experts_NK)
    assert torch.equal(token_EC[slot_NK], torch.arange(N)[:, None].expand(N, 2))


def test_bias_goes_down_where_load_is_high_and_counters_start_anew(tiny):
    router = Router(tiny(experts=4))
    router.load_E.copy_(torch.tensor([10.0, 2.0, 6.0, 6.0]))  # mean 6
    router.update_bias(1e-3)
    assert router.bias_E.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0])
    assert router.load_E.tolist() == [0, 0, 0, 0]
    router.load_E.fill_(1)
    router.load_E[0] = 7
    router.update_bias(0.0)
    assert router.bias_E.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0]) and not router.load_E.any()


def test_centred_biases_have_mean_0_and_choose_the_same_experts(tiny):
    plain, centred = (Router(tiny(experts=8, expert_groups=2, centre_bias=flag)) for flag in (False, True))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(plain.weight, std=0.2, generator=generator)
    centred.weight.data.copy_(plain.weight)
    x_ND = torch.randn(64, plain.weight.shape[1], generator=generator)
    for _ in range(50):
        load_E = torch.rand(8, generator=generator) ** 4  # few experts above the mean: the plain biases drift upwards
        for router in (plain, centred):
            router.load_E.copy_(load_E)
            router.update_bias(0.01)
    assert plain.bias_E.mean() > 0.05 and centred.bias_E.mean().abs() < 1e-6
    torch.testing.assert_close(plain.bias_E - plain.bias_E.mean(), centred.bias_E)
    assert torch.equal(plain(x_ND).experts_NK, centred(x_ND).experts_NK)


def test_router_stays_float32_in_a_bfloat16_model(tiny):
    model = Transformer(tiny())
    model.routers()[0].bias_E.fill_(0.1234567)
    weight = model.routers()[0].weight.detach().clone()
    cast = copy.deepcopy(model).to(torch.bfloat16)
    router = cast.routers()[0]
    assert {t.dtype for t in (router.weight, router.bias_E, router.load_E)} == {torch.float32}
    assert torch.equal(router.weight, weight) and torch.equal(router.bias_E, model.routers()[0].bias_E)
    assert cast.embed.weight.dtype == cast.blocks[1].ffn.experts.down.dtype == torch.bfloat16
    assert cast(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16
    assert isinstance(router.weight, torch.nn.Parameter) and router.weight.requires_grad


def test_padding_counts_neither_in_the_load_nor_in_the_balance_loss(tiny):
    torch.manual_seed(0)
    model = Transformer(tiny(first_dense=0)).train()
    ids = torch.randint(0, 40, (2, 12))
    valid = torch.arange(12) < torch.tensor([[12], [5]])
    balance = model.hidden(ids, valid_BT=valid).balance
    assert [r.load_E.sum().item() for r in model.routers()] == [17 * 2, 17 * 2]
    rows = [model.hidden(ids[:1]).balance, model.hidden(ids[1:, :5]).balance]
    torch.testing.assert_close(balance, (rows[0] + rows[1]) / 2)
    load = model.routers()[0].load_E.clone()
    with torch.no_grad():
        model.hidden(ids)
    model.eval()
    assert model.hidden(ids).balance == 0
    assert torch.equal(load, model.routers()[0].load_E)  # neither inference nor evaluation counts


def test_balance_loss_by_hand():
    # Perfect: each of 4 tokens has its own favourite of 4 experts, k = 1. f_i = 4/4 * 1 = 1, P_i = 1/4 -> sum 1.
    perfect = (torch.eye(4) * 0.8 + 0.1)[None]
    assert sequence_balance(perfect, k=1).item() == pytest.approx(1.0)
    # Collapsed: both tokens choose expert 0 with share .9: f = (4, 0, 0, 0), P_0 = .9 -> 3.6.
    collapsed = torch.tensor([[[0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]] * 2])
    assert sequence_balance(collapsed, k=1).item() == pytest.approx(3.6)
    # Two experts, k = 1, shares (.75, .25) and (.5 - d, .5 + d): f = (1, 1) -> exactly 1 whatever P is.
    assert sequence_balance(torch.tensor([[[0.6, 0.2], [0.4, 0.5]]]), k=1).item() == pytest.approx(1.0)
    # Averaged over sequences.
    both = torch.cat((perfect[:, :2], collapsed))
    first = sequence_balance(perfect[:, :2], k=1)
    assert sequence_balance(both, k=1).item() == pytest.approx((first.item() + 3.6) / 2)


def test_balance_loss_pulls_the_crowded_expert_down():
    scores = torch.tensor([[[0.9, 0.1, 0.1, 0.1]] * 3], requires_grad=True)
    (gradient,) = torch.autograd.grad(sequence_balance(scores, k=1), scores)
    assert (gradient[..., 0] > 0).all() and (gradient[..., 1:] < 0).all()


def test_shared_experts_are_added_without_a_gate(tiny):
    torch.manual_seed(0)
    moe = MoE(tiny(shared_experts=2)).eval()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 5, 32)
    together = moe(x)[0]
    shared = moe.shared(x)
    assert moe.shared.down.weight.shape == (32, 2 * 16)
    moe.shared = None
    torch.testing.assert_close(together, moe(x)[0] + shared)
