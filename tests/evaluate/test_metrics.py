"""Each number against a count by hand or by enumeration, each interval against its coverage by simulation."""

from itertools import combinations

import numpy as np
import pytest

from lit_reason.errors import ConfigError, DataError
from lit_reason.evaluate import (
    majority,
    mean,
    normalise_answer,
    paired_difference,
    pass_at_k,
    proportion,
    wilson_interval,
)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = [any(s) for s in combinations(samples, k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_stable_where_binomials_overflow():
    # C(9999, 5000) has 3,000 digits; with one correct sample pass@k = k/n exactly
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ConfigError, match=f"k={k}"):
        pass_at_k(n, c, k)


def test_majority_by_hand():
    assert majority(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority(["8", "8", "7"], [False, False, True]) == 0.0
    assert majority(["7", "8"], [True, False]) == majority(["8", "7"], [False, True]) == 0.5
    assert majority(["7", "8", "9"], [True, False, False]) == pytest.approx(1 / 3)
    # abstentions do not vote, even when they are the most
    assert majority([None, "", None, "7"], [False, False, False, True]) == 1.0
    assert majority([None, None], [False, False]) == 0.0
    # three spellings of 1204 outvote two of 5
    assert majority(["1,204", "1204.0", "+1204", "5", "5"], [True, True, True, False, False]) == 1.0


@pytest.mark.parametrize(
    ("left", "right"), [("1,204.50", "1204.5"), ("+007", "7"), ("-0", "0"), ("X = 3.", "x=3"), ("1e5", "1E5")]
)
def test_same_answer(left, right):
    assert normalise_answer(left) == normalise_answer(right)


@pytest.mark.parametrize(
    ("left", "right"), [("1,2", "12"), ("-7", "7"), ("1/2", "12"), ("10", "1"), ("1,20,4", "1204")]
)
def test_other_answer(left, right):
    assert normalise_answer(left) != normalise_answer(right)


def test_proportion_of_binary_values_is_wilson():
    # Wilson's bounds solve |p - q| = z sqrt(q (1-q) / n) for q: insert them
    values = [1] * 37 + [0] * 63
    e = proportion(values)
    for q in e.ci:
        assert abs(0.37 - q) == pytest.approx(1.959964 * (q * (1 - q) / 100) ** 0.5, rel=1e-6)
    assert e.value == 0.37 and e.n == 100
    assert e.ci == wilson_interval(0.37, 100)


def test_proportion_keeps_a_width_at_the_ends():
    none, every = proportion([0] * 50), proportion([1] * 50)
    assert none.low == 0 and 0.03 < none.high < 0.1  # rule of three: about 3/50
    assert every.high == 1 and every.low == pytest.approx(1 - none.high)


def coverage(draw, truth, interval, n=2000):
    rng = np.random.default_rng(0)
    hits = [e.low <= truth <= e.high for e in (interval(draw(rng)) for _ in range(n))]
    return float(np.mean(hits))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.95])
def test_greedy_interval_covers(p):
    assert 0.93 <= coverage(lambda rng: rng.random(200) < p, p, proportion) <= 0.99


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 2.0), (0.2, 3.0)])
def test_avg_at_k_interval_covers_when_samples_of_a_question_agree(a, b):
    """Questions differ in difficulty (beta), so 8 samples are not 8 independent trials."""

    def draw(rng):
        return rng.binomial(8, rng.beta(a, b, size=100)) / 8

    truth = a / (a + b)
    assert 0.93 <= coverage(draw, truth, proportion) <= 0.98
    # the interval that forgets the clustering does not cover: the test can tell
    naive = coverage(draw, truth, lambda x: _as_estimate(wilson_interval(float(np.mean(x)), 800)))
    assert naive < 0.9


def _as_estimate(ci):
    from lit_reason.evaluate import Estimate

    return Estimate(0.0, ci[0], ci[1], 0)


def test_mean_interval_covers():
    assert 0.93 <= coverage(lambda rng: rng.normal(2.0, 3.0, size=60), 2.0, mean) <= 0.97


def ids(values):
    return {str(i): float(v) for i, v in enumerate(values)}


def test_paired_verdicts():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.4
    gained = base | (rng.random(400) < 0.3)
    up = paired_difference(ids(base), ids(gained))
    assert up.verdict == "better" and up.low > 0 and up.value == pytest.approx(gained.mean() - base.mean())
    assert paired_difference(ids(gained), ids(base)).verdict == "worse"
    # 3 gained, 2 lost: 0 lies inside
    moved = base.copy()
    right, wrong = np.flatnonzero(base), np.flatnonzero(~base)
    moved[wrong[:3]], moved[right[:2]] = True, False
    small = paired_difference(ids(base), ids(moved))
    assert small.value == pytest.approx(1 / 400) and small.low < 0 < small.high
    assert small.verdict == "no difference shown"


def test_paired_never_claims_from_one_question_or_from_none_that_moved():
    one = paired_difference({"q": 0.0}, {"q": 1.0})
    assert one.verdict == "no difference shown" and one.low <= 0
    still = paired_difference(ids([1, 0] * 20), ids([1, 0] * 20))
    assert still.low < 0 < still.high and still.verdict == "no difference shown"


def test_paired_interval_covers_and_rarely_claims_falsely():
    rng = np.random.default_rng(1)
    covered, better = [], []
    for _ in range(600):
        d = rng.choice([-1, 0, 1], p=[0.15, 0.7, 0.15], size=60)
        r = paired_difference(ids(np.maximum(-d, 0)), ids(np.maximum(d, 0)), resamples=500)
        covered.append(r.low <= 0 <= r.high)
        better.append(r.verdict == "better")
    assert 0.92 <= np.mean(covered) <= 0.985
    assert np.mean(better) <= 0.045  # 2.5% nominal, 3 binomial standard errors above


def test_paired_needs_the_same_questions():
    with pytest.raises(DataError, match="1 only before, 2 only after"):
        paired_difference({"a": 1.0, "b": 1.0}, {"b": 1.0, "c": 0.0, "d": 0.0})
