"""Random numbers that belong to the request, and the draw."""

import hashlib
import math

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.rollout import Sampling, request_seed
from lit_reason.rollout.sampling import draw, uniforms


def drawn(probs, sampling, n=4000, seed=0):
    """How often each token is drawn in n requests."""
    logits_BV = torch.tensor(probs, dtype=torch.float64).log().float().expand(n, -1)
    token_B, _ = draw(logits_BV, sampling, uniforms(range(seed, seed + n), 1)[:, 0])
    return torch.bincount(token_B, minlength=len(probs)).double()


def chi_square(counts, probs) -> float:
    expected = torch.tensor(probs, dtype=torch.float64) * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_request_seed_is_stable():
    expected = int(hashlib.blake2b(b"17/3/00000000000000ab/5", digest_size=8).hexdigest(), 16) // 2
    assert request_seed(17, 3, "00000000000000ab", 5) == expected == 2522012480389219358
    assert len({request_seed(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in "ab" for d in (0, 1)}) == 16
    assert 0 <= request_seed(0, 0, "", 0) < 2**63


def test_uniforms_depend_on_seed_and_step_alone():
    table = uniforms([5, 99, 2**63 - 1], 8)
    assert torch.equal(uniforms([99], 3)[0], table[1, :3])
    assert table.dtype == torch.float64 and table.unique().numel() == 24
    assert ((table >= 0) & (table < 1)).all()


def test_uniforms_are_splitmix64():
    # First two outputs of the published generator for seed 1234567.
    outputs = [6457827717110365317, 3203168211198807973]
    assert uniforms([1234567], 2)[0].tolist() == [(x >> 11) * 2.0**-53 for x in outputs]


def test_uniforms_are_uniform_over_seeds_and_over_steps():
    for values in (uniforms(range(20000), 1)[:, 0], uniforms([7], 20000)[0], uniforms(range(200), 100).flatten()):
        counts = torch.histc(values, bins=20, min=0, max=1)
        assert chi_square(counts.double(), [1 / 20] * 20) < 43.8  # 0.1 % point of 19 degrees of freedom
    table = uniforms(range(2000), 2)
    assert abs(torch.corrcoef(table.T)[0, 1]) < 0.08


def test_frequencies_follow_the_probabilities():
    probs = [0.5, 0.25, 0.15, 0.1]
    assert chi_square(drawn(probs, Sampling()), probs) < 16.27  # 0.1 % point of 3 degrees of freedom
    # Temperature 0.5 squares the probabilities.
    squared = [p**2 / sum(q**2 for q in probs) for p in probs]
    counts = drawn(probs, Sampling(temperature=0.5))
    assert chi_square(counts, squared) < 16.27 < chi_square(counts, probs)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = [0.1, 0.5, 0.15, 0.25]
    assert (drawn(probs, Sampling(top_p=0.5)) > 0).tolist() == [False, True, False, False]
    assert (drawn(probs, Sampling(top_p=0.51)) > 0).tolist() == [False, True, False, True]
    counts = drawn(probs, Sampling(top_p=0.8))
    assert (counts > 0).tolist() == [False, True, True, True]
    assert chi_square(counts[1:], [0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]) < 13.82


def test_min_p_is_relative_to_the_most_likely():
    probs = [0.1, 0.5, 0.15, 0.25]
    assert (drawn(probs, Sampling(min_p=0.25)) > 0).tolist() == [False, True, True, True]
    assert (drawn(probs, Sampling(min_p=0.4)) > 0).tolist() == [False, True, False, True]
    # min-p first, then top-p of what is left: 0.5/0.9 of the mass is the first token's.
    assert (drawn(probs, Sampling(min_p=0.25, top_p=0.55)) > 0).tolist() == [False, True, False, False]


def test_log_probs_are_those_before_truncation_under_the_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    token, logprob = draw(logits, Sampling(temperature=0.5, top_p=0.1), torch.tensor([0.9], dtype=torch.float64))
    assert token.item() == 0
    assert logprob.item() == pytest.approx(4 - math.log(math.exp(4) + math.exp(2) + 1), abs=1e-6)
    token, logprob = draw(logits, Sampling(temperature=0.0), torch.tensor([0.99], dtype=torch.float64))
    assert (token.item(), logprob.item()) == (0, pytest.approx(2 - math.log(math.exp(2) + math.e + 1), abs=1e-6))


def test_impossible_tokens_are_not_drawn_at_the_ends_of_the_interval():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]] * 2)
    token, _ = draw(logits, Sampling(), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert token.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("values", "valid"),
    [
        ({"temperature": -1}, "0 (greedy) or above"),
        ({"top_p": 0}, "in (0, 1]"),
        ({"min_p": 1}, "in [0, 1)"),
        ({"max_tokens": 0}, "at least 1"),
    ],
)
def test_wrong_settings(values, valid):
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)
    assert f"rollout.sampling.{next(iter(values))}=" in str(caught.value) and valid in str(caught.value)


def test_nan_logits_give_a_nan_log_prob_and_a_token_that_exists():
    token, logprob = draw(torch.full((1, 5), float("nan")), Sampling(), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= token.item() < 5 and torch.isnan(logprob).all()
