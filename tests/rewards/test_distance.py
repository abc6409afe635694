import math

import pytest

from lit_reason.errors import ConfigError
from lit_reason.rewards import AnswerDistance, RewardFault


def wrap(answer):
    return f"<think>t</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    "got, want, relative_error",
    [
        ("50", "50", 0),
        ("51", "50", 1 / 50),
        ("45", "50", 5 / 50),
        ("-50", "50", 2),
        ("0.5", "0", 0.5),
        ("1,100", "1000", 0.1),
        ("3/4", "0.5", 0.25),
        ("80%", "70%", 10 / 70),
    ],
)
def test_formula(make, got, want, relative_error):
    assert AnswerDistance(scale=0.1).score(*make(wrap(got), want)) == pytest.approx(math.exp(-relative_error / 0.1))


def test_closer_scores_more_and_range(make):
    scores = [AnswerDistance(scale=0.5).score(*make(wrap(a), "100")) for a in (100, 101, 95, 110, 200, -(10**90))]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 6
    assert scores[0] == 1.0 and all(0 <= s <= 1 for s in scores)


@pytest.mark.parametrize(
    "text", ["50", wrap("fifty"), wrap(""), wrap("50%"), wrap("50") + wrap("50"), wrap("9" * 5000)]
)
def test_what_is_no_comparable_number_scores_zero(make, text):
    assert AnswerDistance().score(*make(text, "50")) == 0.0


def test_a_reference_that_is_no_number_is_a_fault(make):
    entry = AnswerDistance().score(*make(wrap("50"), "red"))
    assert isinstance(entry, RewardFault) and "not a number" in entry.message


def test_scale_must_be_positive():
    with pytest.raises(ConfigError, match="scale"):
        AnswerDistance(scale=0.0)
