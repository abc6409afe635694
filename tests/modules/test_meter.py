"""Metrics of an optimizer step from those of its micro-batches."""

import pytest
import torch

from lit_reason.modules.base import Meter


def test_means_sums_maxima_and_effective_sample_sizes():
    """Weights 1 and 3. Mean (2 + 3 * 6) / 4; sum 1 + 4; moments (1 + 3 * 2) / 4 and (1 + 3 * 5) / 4: 1.75^2 / 4."""
    meter = Meter()
    meter.add({"a": 2.0, "b/max": 5.0, "c/ess": torch.tensor([1.0, 1.0])}, {"loss": 1.0}, 1.0)
    meter.add({"a": 6.0, "b/max": -1.0, "c/ess": torch.tensor([2.0, 5.0])}, {"loss": 4.0}, 3.0)
    assert meter.take() == pytest.approx({"a": 5.0, "b/max": 5.0, "c/ess": 1.75**2 / 4, "loss": 5.0})


def test_explained_variance_is_that_of_the_whole_step():
    """R = 1 | 3 and R - V = 0 | 1, one token in each micro-batch: 1 - 0.25 / 1, though neither varies by itself."""
    meter = Meter()
    for r, e in ((1.0, 0.0), (3.0, 1.0)):
        meter.add({"critic/explained_variance": torch.tensor([r, r * r, e, e * e])}, {}, 1.0)
    assert meter.take() == pytest.approx({"critic/explained_variance": 0.75})
    meter.add({"critic/explained_variance": torch.tensor([1.3, 1.3 * 1.3, 0.5, 0.3], dtype=torch.float64)}, {}, 1.0)
    assert meter.take() == {"critic/explained_variance": 0.0}


def test_a_micro_batch_without_tokens_weighs_nothing():
    meter = Meter()
    meter.add({"a": float("nan"), "c/ess": torch.tensor([0.0, 0.0])}, {}, 0.0)
    meter.add({"a": 3.0, "c/ess": torch.tensor([0.0, 0.0])}, {}, 2.0)
    assert meter.take() == {"a": 3.0, "c/ess": 1.0}
    assert meter.take() == {}
    meter.add({"a": float("nan")}, {"loss": 0.0}, 0.0)
    assert meter.take() == {"loss": 0.0}, "a step without a token has no means"


def test_over_two_processes():
    """Both have weight 1; the other one has a = 4, loss 10 and the largest b."""
    meter = Meter()
    meter.add({"a": 2.0, "b/max": 5.0}, {"loss": 1.0}, 1.0)
    other = {"sum": [1.0, 10.0, 4.0], "max": [7.0]}
    both = {"sum": lambda x, y: x + y, "max": max}

    def reduce(values, how):
        return [both[how](*pair) for pair in zip(values, other[how], strict=True)]

    assert meter.take(reduce) == {"a": 3.0, "b/max": 7.0, "loss": 11.0}
