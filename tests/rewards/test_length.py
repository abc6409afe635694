import json
from pathlib import Path

import pytest

from lit_reason.errors import ConfigError
from lit_reason.rewards import Length

GOLDEN = Path(__file__).parents[1] / "golden" / "edge_cases.json"


def test_soft_overlong_equals_the_paper(make):
    case = json.loads(GOLDEN.read_text())["cases"]["dapo_soft_overlong"]
    reward = Length(case["L_max"], buffer=case["L_cache"], inside=0.0, outside=-1.0)
    assert [reward.score(*make(tokens=n)) for n in case["lengths"]] == case["paper"]


def test_linear_fall(make):
    reward = Length(max_tokens=20, buffer=10)
    assert [reward.score(*make(tokens=n)) for n in (0, 10, 11, 15, 20, 21)] == pytest.approx([1, 1, 0.9, 0.5, 0, 0])


def test_without_buffer_it_is_a_step(make):
    reward = Length(max_tokens=20, outside=-1.0)
    assert [reward.score(*make(tokens=n)) for n in (20, 21)] == [1, -1]


@pytest.mark.parametrize("kwargs", [{"max_tokens": 0}, {"max_tokens": 5, "buffer": 6}, {"max_tokens": 5, "buffer": -1}])
def test_impossible_limits_are_refused(kwargs):
    with pytest.raises(ConfigError, match="buffer"):
        Length(**kwargs)
