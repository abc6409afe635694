"""Surrogates by hand where reference numbers are silent: soft gates, divergences, geometric means, RPG's branches."""

import math

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.objectives import CLIPS, Objective
from lit_reason.types import PolicyBatch

D = torch.float64


def surrogate(name, ratios, advantages, logprobs=None, mask=None, **settings):
    """(loss, its gradient w.r.t. the new log-probs, cut below, cut above) of one row of tokens."""
    target = torch.full((1, len(ratios)), -1.0, dtype=D) if logprobs is None else torch.tensor([logprobs], dtype=D)
    new_BT = target.clone().requires_grad_()
    old_BT = target - torch.tensor([ratios], dtype=D).log()
    mask_BT = torch.ones_like(old_BT) if mask is None else torch.tensor([mask], dtype=D)
    advantages_BT = torch.tensor([advantages], dtype=D)
    out = CLIPS[name]((new_BT - old_BT).exp(), advantages_BT, new_BT, mask_BT, **settings)
    (grad_BT,) = torch.autograd.grad((out.loss_BT * mask_BT).sum(), new_BT)
    return out.loss_BT[0].tolist(), grad_BT[0].tolist(), out.low_BT[0].tolist(), out.high_BT[0].tolist()


def test_reinforce_knows_no_ratio():
    loss, grad, low, high = surrogate("reinforce", [0.1, 7.0], [2.0, -3.0], logprobs=[-0.5, -2.0])
    assert loss == pytest.approx([1.0, -6.0])
    assert grad == pytest.approx([-2.0, 3.0])
    assert not any(low + high)


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    """min(r, 5) A at r = 9; the floor lifts 0.1 to 0.8."""
    loss, grad, low, high = surrogate("cispo", [9.0, 0.1], [2.0, -1.0], logprobs=[-0.5, -2.0], floor=None, cap=5.0)
    assert grad == pytest.approx([-10.0, 0.1])
    assert loss == pytest.approx([5.0, -0.2])
    assert (low, high) == ([False, False], [True, False])
    _, grad, low, _ = surrogate("cispo", [9.0, 0.1], [2.0, -1.0], floor=0.8, cap=5.0)
    assert grad == pytest.approx([-10.0, 0.8])
    assert low == [False, True]


def test_cispo_marks_what_is_capped_not_what_reaches_the_cap():
    ratio_BT, one_BT = torch.tensor([[0.25, 0.5, 2.0, 4.0]]), torch.ones(1, 4)
    out = CLIPS["cispo"](ratio_BT, one_BT, -one_BT, one_BT, floor=0.5, cap=2.0)
    assert out.low_BT[0].tolist() == [True, False, False, False]
    assert out.high_BT[0].tolist() == [False, False, False, True]


@pytest.mark.parametrize("dual", [None, 4.0])
def test_ppo_marks_what_its_bounds_cut(dual):
    """Bounds 0.5 and 1.5, themselves inside; the lower acts where A < 0, the upper where A > 0, none at A = 0."""
    ratio_BT, one_BT = torch.tensor([[0.25, 0.5, 0.75, 1.25, 1.5, 1.75]]), torch.ones(1, 6)
    for advantage, low, high in ((-0.5, [0], []), (0.5, [], [5]), (0.0, [], [])):
        out = CLIPS["ppo"](ratio_BT, advantage * one_BT, -one_BT, one_BT, low=0.5, high=0.5, dual=dual)
        assert out.low_BT[0].nonzero().flatten().tolist() == low
        assert out.high_BT[0].nonzero().flatten().tolist() == high


@pytest.mark.parametrize(("name", "settings"), [("ppo", {}), ("rpg_clip", {"divergence": "forward", "beta": 0.1})])
def test_a_dual_bound_of_one_is_refused_and_one_above_is_not(name, settings):
    bounds = {"low": 0.2, "high": 0.2} | settings
    assert surrogate(name, [1.0], [1.0], **bounds, dual=1.5)[1] != [0.0]
    with pytest.raises(ConfigError, match=r"clip.dual: got 1.0"):
        surrogate(name, [1.0], [1.0], **bounds, dual=1.0)


def test_sapo_gate():
    """d/dx = -4 s (1 - s) r A with s = sigmoid(tau (r - 1)): exactly -A at r = 1, whatever tau."""
    ratios, advantages = [1.0, 1.0, 3.0, 3.0, 0.25], [2.0, -2.0, 1.0, -1.0, 1.0]
    loss, grad, low, high = surrogate("sapo", ratios, advantages, tau_positive=1.0, tau_negative=2.0)
    assert grad[:2] == pytest.approx([-2.0, 2.0])
    assert loss[:2] == pytest.approx([-4.0, 2.0])  # -(4 / tau) A / 2
    assert surrogate("sapo", [1.0], [0.5], tau_positive=0.5, tau_negative=0.25)[0] == pytest.approx([-2.0])
    for i, tau in ((2, 1.0), (3, 2.0), (4, 1.0)):
        s = 1 / (1 + math.exp(-tau * (ratios[i] - 1)))
        assert loss[i] == pytest.approx(-4 / tau * s * advantages[i])
        assert grad[i] == pytest.approx(-4 * s * (1 - s) * ratios[i] * advantages[i])
    assert not any(low + high)


def test_dppo_drops_what_leads_further_away():
    """p from 0.5 to 0.9 moves by 0.4; a rare token at a hundredfold ratio moves by 0.0099."""
    new = [0.9, 0.9, 0.1, 0.1, 0.01]
    ratios, advantages = [1.8, 1.8, 0.2, 0.2, 100.0], [1.0, -1.0, 1.0, -1.0, 1.0]
    logs = [math.log(p) for p in new]
    loss, grad, low, high = surrogate("dppo", ratios, advantages, logs, divergence="tv", threshold=0.35)
    assert high == [True, False, False, False, False]
    assert low == [False, False, False, True, False]
    expected = [0.0, 1.8, -0.2, 0.0, -100.0]
    assert grad == pytest.approx(expected)
    assert loss == pytest.approx(expected)
    assert surrogate("dppo", ratios, advantages, logs, divergence="tv", threshold=0.41)[1][0] == pytest.approx(-1.8)


def test_dppo_kl_is_from_old_to_new():
    """p 0.5 to 0.9: KL(old || new) = 0.511, KL(new || old) = 0.368."""
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    for threshold, cut in ((forward - 1e-6, True), (forward + 1e-6, False)):
        settings = {"divergence": "kl", "threshold": threshold}
        assert surrogate("dppo", [1.8], [1.0], [math.log(0.9)], **settings)[3] == [cut]
    # A certain token and one that underflows end in no NaN.
    loss, grad, *_ = surrogate("dppo", [1.0, 1e-9], [1.0, -1.0], [0.0, -800.0], divergence="kl", threshold=0.05)
    assert all(map(math.isfinite, loss + grad))


def test_dppo_threshold_is_exceeded_not_reached_and_nothing_is_cut_without_an_advantage():
    """p from 0.5 to 1: D = 0.5 exactly."""
    ratio_BT, one_BT, zero_BT = torch.tensor([[2.0]]), torch.ones(1, 1), torch.zeros(1, 1)
    for threshold, advantage, cut in ((0.5, 1.0, False), (0.49, 1.0, True), (0.49, 0.5, True), (0.49, 0.0, False)):
        out = CLIPS["dppo"](ratio_BT, advantage * one_BT, zero_BT, one_BT, divergence="tv", threshold=threshold)
        assert (out.high_BT.item(), out.low_BT.item()) == (cut, False)
    for advantage, cut in ((-0.5, True), (0.0, False)):  # p from 1 to 0.5
        out = CLIPS["dppo"](
            0.5 * one_BT, advantage * one_BT, one_BT * math.log(0.5), one_BT, divergence="tv", threshold=0.2
        )
        assert (out.high_BT.item(), out.low_BT.item()) == (False, cut)


@pytest.mark.parametrize(("ratio", "new"), [(2.0, 1.0), (0.5, 0.5)])
def test_dppo_kl_of_a_token_that_was_or_became_certain(ratio, new):
    """p from 0.5 to 1 is as good as infinitely far; p from 1 to 0.5 is log 2 = 0.69."""
    sign = 1.0 if ratio > 1 else -1.0
    for threshold, cut in ((0.69, True), (0.7, ratio > 1)):
        settings = {"divergence": "kl", "threshold": threshold}
        loss, _, low, high = surrogate("dppo", [ratio], [sign], [math.log(new)], **settings)
        assert low + high == [cut and sign < 0, cut and sign > 0]
        assert loss == pytest.approx([0.0 if cut else -ratio * sign])


def test_dppo_kl_of_a_token_that_stays_impossible():
    """Both probabilities underflow: nothing has moved, although one logarithm would be infinite."""
    *_, low, high = surrogate("dppo", [0.5], [-1.0], [-800.0], divergence="kl", threshold=0.05)
    assert low + high == [False, False]


def test_gmpo_bounds_are_exceeded_not_reached():
    """At r = 1 with bounds of 0 nothing is cut: the gradient is -A / L; without an advantage nothing is marked."""
    for advantage in (1.0, -1.0):
        _, grad, low, high = surrogate("gmpo", [1.0, 1.0], [advantage] * 2, low=0.0, high=0.0)
        assert grad == pytest.approx([-advantage] * 2)
        assert not any(low + high)
    *_, low, high = surrogate("gmpo", [9.0, 0.1], [0.0] * 2, low=0.3, high=0.4)
    assert not any(low + high)
    assert surrogate("gmpo", [9.0, 0.1], [0.5] * 2, low=0.3, high=0.4)[3] == [True, False]


def test_gmpo_of_one_token_is_its_ratio():
    loss, grad, *_ = surrogate("gmpo", [1.2], [2.0], low=0.4, high=0.4)
    assert loss == pytest.approx([-2.4])
    assert grad == pytest.approx([-2.4])


def test_gmpo_is_the_geometric_mean_of_clipped_ratios():
    """A > 0: log r = 1.0 is cut to 0.4, -0.9 is not; the masked token counts neither in the mean nor in its length."""
    ratios, mask = [math.e, math.exp(-0.9), math.exp(0.2), 50.0], [1.0, 1.0, 1.0, 0.0]
    mean = math.exp((0.4 - 0.9 + 0.2) / 3)
    loss, grad, low, high = surrogate("gmpo", ratios, [2.0] * 4, mask=mask, low=0.3, high=0.4)
    assert loss[:3] == pytest.approx([-2 * mean] * 3)
    # Three tokens hold the same loss, each with a third of the mean's logarithm.
    assert grad == pytest.approx([0.0, -2 * mean, -2 * mean, 0.0])
    assert (low[:3], high[:3]) == ([False] * 3, [True, False, False])


def test_gmpo_where_the_advantage_is_negative():
    """A < 0: -0.9 is cut to -0.3, 1.0 and 0.2 are not."""
    ratios = [math.e, math.exp(-0.9), math.exp(0.2)]
    mean = math.exp((1.0 - 0.3 + 0.2) / 3)
    loss, grad, low, high = surrogate("gmpo", ratios, [-1.0] * 3, low=0.3, high=0.4)
    assert loss == pytest.approx([mean] * 3)
    assert grad == pytest.approx([mean, 0.0, mean])
    assert (low, high) == ([False, True, False], [False] * 3)


@pytest.mark.parametrize("divergence", ["forward", "forward_unnormalised", "reverse", "reverse_unnormalised"])
def test_rpg_styles_have_the_same_gradient_and_no_other_does(divergence):
    """Prop. 4.1 token by token, against the derivative of each KL written out."""
    ratios, advantages, beta = [0.3, 1.0, 2.5], [1.0, -0.5, 0.25], 0.7
    slope = {  # d KL / dx, with dw/dx = w
        "forward": lambda w: -1.0,
        "forward_unnormalised": lambda w: w - 1,
        "reverse": lambda w: w * (math.log(w) + 1),
        "reverse_unnormalised": lambda w: w * math.log(w),
    }[divergence]
    expected = [-w * a + beta * slope(w) for w, a in zip(ratios, advantages, strict=True)]
    for style in ("differentiable", "reinforce"):
        _, grad, *_ = surrogate("rpg", ratios, advantages, divergence=divergence, beta=beta, style=style)
        assert grad == pytest.approx(expected), style


BOUNDS = {"low": 0.2, "high": 0.28, "dual": 10.0}


@pytest.mark.parametrize(
    ("w", "A", "beta", "weight"),
    [
        (0.5, 1.0, 0.0, 0.5),  # A > 0: everything below 1.28
        (1.27, 1.0, 0.0, 1.27),
        (1.29, 1.0, 0.0, None),
        (0.79, -1.0, 0.0, None),  # A < 0: between 0.8 and 10
        (0.81, -1.0, 0.0, -0.81),
        (9.9, -1.0, 0.0, -9.9),
        (10.1, -1.0, 0.0, None),
        # forward: C = beta. A + C / w = -0.1 + 0.2 / 0.5 > 0 although A < 0: the upper bound alone acts.
        (0.5, -0.1, 0.2, -0.05 + 0.2),
        (1.5, -0.1, 0.2, None),
        (3.0, -0.1, 0.2, -0.3 + 0.2),  # -0.1 + 0.2 / 3 < 0: below 10 it goes on
    ],
)
def test_rpg_clip_branches_on_the_regularised_advantage(w, A, beta, weight):
    settings = BOUNDS | {"divergence": "forward", "beta": beta}
    _, grad, *_ = surrogate("rpg_clip", [w], [A], **settings)
    assert grad[0] == pytest.approx(0.0 if weight is None else -weight)


def test_rpg_clip_cuts_what_reaches_a_bound():
    """Bounds 0.5, 1.5 and 4: open intervals, with the loss of the bound itself; no sign (A = 0) is that of A > 0."""
    one_BT = torch.ones(1, 1)
    settings = {"divergence": "forward", "low": 0.5, "high": 0.5, "dual": 4.0}
    for w, A, beta, low, high, weight in (
        (0.5, -1.0, 0.0, True, False, 0.0),
        (0.625, -1.0, 0.0, False, False, -0.625),
        (1.25, -1.0, 0.0, False, False, -1.25),
        (4.0, -1.0, 0.0, False, False, 0.0),
        (1.5, 1.0, 0.0, False, True, 0.0),
        (1.375, 0.5, 0.0, False, False, 0.6875),
        (0.0, 1.0, 0.0, False, False, 0.0),  # underflowed, without a KL: still the sign of A
        (0.5, -1.0, 0.5, False, False, 0.0),  # A + C / w = 0: the lower bound is not that of this sign
    ):
        new_BT = (-2 * one_BT).requires_grad_()
        out = CLIPS["rpg_clip"](w * one_BT, A * one_BT, new_BT, one_BT, beta=beta, **settings)
        assert (out.low_BT.item(), out.high_BT.item()) == (low, high), w
        assert out.loss_BT.item() == pytest.approx((A * w + beta) * 2)
        (grad_BT,) = torch.autograd.grad(out.loss_BT.sum(), new_BT)
        assert grad_BT.item() == pytest.approx(-weight), w


@pytest.mark.parametrize("style", ["differentiable", "reinforce"])
def test_rpg_marks_nothing(style):
    *_, low, high = surrogate("rpg", [9.0], [1.0], divergence="forward", beta=0.1, style=style)
    assert (low, high) == ([False], [False])


def test_rpg_clip_takes_the_kl_at_the_clipped_ratio_and_detaches_it():
    """reverse_unnormalised at w = 3, A = -1: C = -beta 1.28 log 1.28, and only l = -x carries gradient."""
    C = -0.5 * 1.28 * math.log(1.28)
    loss, grad, *_ = surrogate(
        "rpg_clip", [3.0], [-1.0], logprobs=[-2.0], **BOUNDS, divergence="reverse_unnormalised", beta=0.5
    )
    assert grad == pytest.approx([-(-3.0 + C)])
    assert loss == pytest.approx([(-3.0 + C) * 2])
    loss, *_ = surrogate("rpg_clip", [12.0], [-1.0], logprobs=[-2.0], **BOUNDS, divergence="forward", beta=0.5)
    assert loss == pytest.approx([(-10.0 + 0.5) * 2])  # Algorithm 2's +C, also outside the bounds


def test_rpg_dual_clip_clips_by_the_sign_of_the_regularised_advantage():
    """A = 0.1 at w = 2: A - 0.5 (log 2 + 1) < 0, so nothing is cut before 10, and the KL is a constant there."""
    regularised = 0.1 - 0.5 * (math.log(2) + 1)
    settings = BOUNDS | {"beta": 0.5}
    _, grad, low, high = surrogate("rpg_dual_clip", [2.0], [0.1], divergence="reverse", **settings)
    assert grad == pytest.approx([-2 * regularised])
    assert not any(low + high)
    assert surrogate("rpg_dual_clip", [2.0], [0.1], divergence="forward", **settings)[1] == [0.0]
    assert surrogate("rpg_dual_clip", [0.5], [0.1], divergence="reverse_unnormalised", **settings)[1] == pytest.approx(
        [-0.5 * (0.1 - 0.5 * math.log(0.5))]
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("cispo", {"floor": None, "cap": 5.0}),
        ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
        ("dppo", {"divergence": "tv", "threshold": 0.2}),
        ("dppo", {"divergence": "kl", "threshold": 0.05}),
        ("gmpo", {"low": 0.4, "high": 0.4}),
        *(
            (name, extra | {"divergence": divergence, "beta": 0.1})
            for divergence in ("forward", "forward_unnormalised", "reverse", "reverse_unnormalised")
            for name, extra in (
                ("rpg", {"style": "differentiable"}),
                ("rpg", {"style": "reinforce"}),
                ("rpg_clip", BOUNDS),
                ("rpg_dual_clip", BOUNDS),
            )
        ),
    ],
)
@pytest.mark.parametrize("old", [-401.0, 399.0])
def test_a_ratio_beyond_the_dtype_gives_no_nan(name, settings, old):
    """exp(+-400) is inf or 0 in float32."""
    new_BT, mask_BT = torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.ones(1, 2)
    ids_BT, one = torch.zeros(1, 2, dtype=torch.long), torch.tensor(1.0)
    objective = Objective("rloo", "token", {"name": name} | settings, "token_mean")
    for advantage in (1.0, -1.0):
        batch = PolicyBatch(
            *(ids_BT, ids_BT, mask_BT, advantage * mask_BT, -mask_BT, mask_BT.sum(1), one, 2 * one, one, 2 * one),
            old_logprobs_BT=torch.tensor([[old, -2.0]]),
        )
        loss = objective.loss(new_BT, batch).loss
        (grad_BT,) = torch.autograd.grad(loss, new_BT)
        assert loss.isfinite()
        assert grad_BT.isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("sapo", {"tau_positive": 0.0, "tau_negative": 1.0}, "got 0.0, 1.0; valid: above 0"),
        ("sapo", {"tau_positive": 1.0, "tau_negative": 0.0}, "got 1.0, 0.0; valid: above 0"),
        (
            "rpg_clip",
            {"divergence": "forward", "beta": 0.1, "low": 0.2, "high": 0.2, "dual": 0.5},
            "got 0.5; valid: a number above 1",
        ),
    ],
)
def test_a_range_without_sense_is_refused(name, settings, said):
    with pytest.raises(ConfigError, match=said):
        surrogate(name, [1.0], [1.0], **settings)
