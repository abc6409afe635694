"""Rotary tables against complex numbers, YaRN against its paper's formulas."""

import cmath
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_reason.models import Yarn
from lit_reason.models.rope import apply_rope, rope_table, softmax_scale


def table(config) -> torch.Tensor:
    return rope_table(config, torch.device("cpu"))


def rotated(config, x, position):
    return apply_rope(x, table(config)[position])


def test_pairs_are_rotated_as_complex_numbers(tiny):
    config = tiny(qk_rope_head_dim=6, rope_theta=100.0)
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    got = rotated(config, x, 7)
    for j in range(3):
        z = complex(x[2 * j], x[2 * j + 1]) * cmath.exp(1j * 7 * 100.0 ** (-2 * j / 6))
        assert abs(complex(got[2 * j], got[2 * j + 1]) - z) < 1e-6


def test_scores_depend_on_the_distance_only(tiny):
    config = tiny(qk_rope_head_dim=8)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    scores = [float(rotated(config, q, p + 9) @ rotated(config, k, p)) for p in (0, 5, 40, 80)]
    assert max(scores) - min(scores) < 1e-5
    assert abs(scores[0] - float(rotated(config, q, 4) @ rotated(config, k, 0))) > 1e-2


@pytest.mark.parametrize(("all_dim", "factor"), [(1.0, 1.873854), (0.707, 1.589626), (0.0, 1.0)])
def test_yarn_raises_the_softmax_scale(tiny, all_dim, factor):
    config = tiny(yarn=Yarn(factor=40.0, mscale_all_dim=all_dim))
    assert softmax_scale(config) / (8 + 4) ** -0.5 == pytest.approx(factor, abs=1e-6)
    assert softmax_scale(tiny()) == pytest.approx(12**-0.5)


def test_yarn_multiplies_the_tables_by_the_ratio_of_its_temperatures(tiny):
    plain = table(tiny(yarn=Yarn(factor=40.0, mscale=1.0, mscale_all_dim=1.0)))
    other = table(tiny(yarn=Yarn(factor=40.0, mscale=1.0, mscale_all_dim=0.707)))
    ratio = (0.1 * math.log(40) + 1) / (0.0707 * math.log(40) + 1)
    assert plain[0, 0] == 1.0
    torch.testing.assert_close(other, plain * ratio)


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones(tiny):
    theta, half, original = 10_000.0, 32, 4096
    config = tiny(qk_rope_head_dim=2 * half, yarn=Yarn(factor=40.0, original_max_seq_len=original))
    angle = table(config)[1].angle().double()  # at position 1 the angle is the frequency itself
    for j in range(half):
        frequency = theta ** (-j / half)
        turns = original * frequency / (2 * math.pi)
        if turns > 45:  # clearly above beta_fast = 32 rotations in the original context
            expected = frequency
        elif turns < 0.8:  # clearly below beta_slow = 1
            expected = frequency / 40
        else:
            assert frequency / 40 * 0.999 <= angle[j] <= frequency * 1.001
            continue
        assert float(angle[j]) == pytest.approx(expected, rel=1e-4)


def test_yarn_ramp_in_the_middle(tiny):
    # dim(r) = half * ln(4096 / (2 pi r)) / ln(theta): dim(32) = 10.47 -> 10, dim(1) = 22.51 -> 23.
    angle = table(tiny(qk_rope_head_dim=64, yarn=Yarn(factor=40.0)))[1].angle()
    frequency = 10_000.0 ** (-16 / 32)
    share = (16 - 10) / (23 - 10)
    expected = frequency / 40 * share + frequency * (1 - share)
    assert float(angle[16]) == pytest.approx(expected, rel=1e-5)


def test_a_table_first_used_in_generation_serves_training(tiny):
    config = tiny(rope_theta=123.0)  # a table of its own in the cache
    with torch.inference_mode():
        rotated(config, torch.randn(4), 1)
    x = torch.randn(4, requires_grad=True)
    rotated(config, x, 1).sum().backward()
    assert x.grad is not None


def test_a_tracers_stand_in_does_not_stay(tiny):
    config = tiny(rope_theta=124.0)
    with FakeTensorMode():
        table(config)
    assert type(table(config)) is torch.Tensor
