"""The table of kl.py by exact enumeration over five tokens, the adaptive coefficients, and what they refuse."""

import math

import pytest
import torch

from lit_reason.objectives import KL_TERMS, Objective
from lit_reason.objectives.kl import adapted_weight
from lit_reason.objectives.metrics import weight_moments

theta, theta_ref, theta_old = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OFF_POLICY = {"k2_is_loss": "reverse", "k3_is_loss": "forward", "k3_is_corrected": "reverse"}


def distributions():
    x = theta.clone().requires_grad_()
    return x, x.log_softmax(0), theta_ref.log_softmax(0), theta_old.log_softmax(0)


def gradients_of_the_two_kls():
    x, log_p, log_ref, _ = distributions()
    reverse = (log_p.exp() * (log_p - log_ref)).sum()
    forward = (log_ref.exp() * (log_ref - log_p)).sum()
    return {name: torch.autograd.grad(kl, x, retain_graph=True)[0] for name, kl in
            (("reverse", reverse), ("forward", forward), ("none", 0 * reverse))}  # fmt: skip


def expected_gradient(name, off_policy):
    """Of the term as training sees it: sampled from pi or old, the reward's KL a constant times the score function."""
    x, log_p, log_ref, log_old = distributions()
    sampler = log_old if off_policy else log_p.detach()
    ratio = (log_p - sampler).exp()
    term = KL_TERMS[name]
    if term.place == "loss":
        value = term.estimator(log_p, log_ref, ratio)
    else:
        value = term.estimator(sampler, log_ref, torch.ones(5)).detach() * ratio
    return torch.autograd.grad((sampler.exp() * value).sum(), x)[0]


@pytest.mark.parametrize("name", KL_TERMS)
def test_the_gradient_is_the_one_that_the_name_says(name):
    exact = gradients_of_the_two_kls()
    on, off = expected_gradient(name, False), expected_gradient(name, True)
    torch.testing.assert_close(on, exact[KL_TERMS[name].gradient], atol=1e-12, rtol=0)
    for kind in ("reverse", "forward"):
        same = torch.allclose(off, exact[kind], atol=1e-12)
        assert same == (OFF_POLICY.get(name) == kind), (name, kind)
    assert (exact["reverse"] - exact["forward"]).norm() > 0.1


def test_the_weight_steers_to_its_target():
    """1909.08593: at most 20% of the error counts, times the rate."""
    assert adapted_weight(1.0, 0.05, 0.05, 0.1) == 1
    assert adapted_weight(1.0, 0.055, 0.05, 0.1) == pytest.approx(1.01)
    assert adapted_weight(1.0, 5.0, 0.05, 0.1) == pytest.approx(1.02)
    assert adapted_weight(2.0, 0.0, 0.05, 0.5) == pytest.approx(1.8)


def make(**settings):
    return Objective("group_mean", "token", "none", "token_mean", **settings)


def test_coefficients_follow_what_a_step_measured_and_resume():
    """KL: 0.1 (1 + 0.1 * 0.2) twice. Entropy: below the target 0.01 + 0.005 acts; above it c shrinks and none acts."""
    spec = {"name": "k2_loss", "weight": 0.1, "target": 0.05}
    built = make(kl=spec, entropy_coef=0.01, entropy_target=0.2).coefficients
    built.adapt({"kl/k3": 9.0, "entropy": 0.1})
    assert (built.kl, built.entropy) == pytest.approx((0.102, 0.015))
    built.adapt({"kl/k3": 9.0, "entropy": 0.3})
    assert (built.kl, built.entropy) == pytest.approx((0.10404, 0.0))
    again = make(kl=spec, entropy_coef=0.01, entropy_target=0.2).coefficients
    again.load_state_dict(built.state_dict())
    for both in (built, again):
        both.adapt({"kl/k3": 0.05, "entropy": 0.2})
    assert (built.kl, built.entropy) == (again.kl, again.entropy) == pytest.approx((0.10404, 0.015))
    assert built.metrics() == {"coefficient/kl": built.kl, "coefficient/entropy": built.entropy}


def test_fixed_coefficients_stay():
    built = make(kl={"name": "k2_loss", "weight": 0.1}, entropy_coef=0.01).coefficients
    built.adapt({"kl/k3": 9.0, "entropy": 0.0})
    assert (built.kl, built.entropy, built.metrics()) == (0.1, 0.01, {})


def test_an_entropy_target_asks_for_the_entropy_from_a_coefficient_of_0_on():
    built = make(entropy_target=0.2)
    assert built.needs_entropy and not make().needs_entropy
    for _ in range(3):
        built.coefficients.adapt({"entropy": 0.25})
    assert built.coefficients.entropy == 0
    built.coefficients.adapt({"entropy": 0.15})
    assert built.coefficients.entropy == 0.005


def test_moments_of_weights():
    log_weights = torch.tensor([[0.0, math.log(3.0), 50.0]])
    on = torch.tensor([[True, True, False]])
    assert weight_moments(log_weights, on).tolist() == pytest.approx([2.0, 5.0])
    assert weight_moments(torch.full((1, 2), 400.0), on[:, :2]).isfinite().all()
