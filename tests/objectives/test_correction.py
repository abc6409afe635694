"""The engine's correction: what is multiplied, what is not, and what is reported."""

import math

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.objectives import CORRECTIONS, Objective
from lit_reason.objectives.correction import correction_metrics, log_ratio
from lit_reason.types import PolicyBatch

MASK_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
LOG_RHO_BT = torch.tensor([[0.9, -1.2, 0.6], [-0.4, 0.2, 0.0]])
MEAN_0, MEAN_1 = 0.1, -0.1  # of the two rows


def correct(name, **settings):
    return CORRECTIONS[name](LOG_RHO_BT, MASK_BT, **settings)


def logs(correction):
    return [[math.log(w) if w else None for w in row] for row in correction.weights_BT.tolist()]


def test_levels():
    """0.9 - 1.2 + 0.6 = 0.3 over three tokens, -0.4 + 0.2 = -0.2 over two."""
    far = {"high": 1e6}
    assert logs(correct("truncate", level="token", **far))[0] == pytest.approx([0.9, -1.2, 0.6], abs=1e-6)
    assert logs(correct("truncate", level="sequence", **far)) == [pytest.approx([s] * 3) for s in (0.3, -0.2)]
    assert logs(correct("truncate", level="geometric", **far)) == [
        pytest.approx([m] * 3, abs=1e-6) for m in (MEAN_0, MEAN_1)
    ]


def test_truncated_and_masked():
    """e^0.6 = 1.82, e^0.9 = 2.46, e^-1.2 = 0.30."""
    truncated = correct("truncate", level="token", high=2.0)
    assert truncated.weights_BT[0].tolist() == pytest.approx([2.0, math.exp(-1.2), math.exp(0.6)])
    assert truncated.cut_BT[0].tolist() == [True, False, False]
    masked = correct("mask", level="token", low=0.5, high=2.0)
    assert masked.weights_BT[0].tolist() == pytest.approx([0.0, 0.0, math.exp(0.6)])
    assert masked.cut_BT[0].tolist() == [True, True, False]
    assert correct("mask", level="token", low=None, high=2.0).cut_BT[0].tolist() == [True, False, False]
    edge = math.exp(0.6) - 1e-6  # the bounds themselves are kept
    assert not CORRECTIONS["mask"](torch.zeros(1, 1), torch.ones(1, 1), level="token", low=1.0, high=1.0).cut_BT.any()
    assert not CORRECTIONS["truncate"](torch.zeros(1, 1), torch.ones(1, 1), level="token", high=1.0).cut_BT.any()
    assert correct("mask", level="token", low=None, high=edge).cut_BT[0].tolist() == [True, False, True]
    for low, high in ((0.0, 0.0), (1.5, 2.0), (0.1, 0.5)):
        with pytest.raises(ConfigError, match="valid: low <= 1 <= high"):
            correct("mask", level="token", low=low, high=high)


def test_log_ratio_is_trainer_over_engine_and_leaves_out_what_is_missing():
    old_BT, rollout_BT = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, math.nan, 4.0]])
    assert log_ratio(old_BT, rollout_BT, torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [[0.5, 0.0, 0.0]]


def test_metrics():
    """Weights 2 and 1 count, the third is masked: means 3 / 2 and 5 / 2."""
    correction = CORRECTIONS["truncate"](torch.tensor([[5.0, 0.0, 5.0]]), torch.ones(1, 3), level="token", high=2.0)
    on_BT = torch.tensor([[True, True, False]])
    got = correction_metrics(correction, on_BT)
    assert got["correction/ess"].tolist() == pytest.approx([1.5, 2.5])
    assert got["correction/cut"].item() == pytest.approx(0.5)
    assert correction_metrics(correction, ~on_BT & on_BT)["correction/ess"].tolist() == [0, 0]


def test_share_of_small_weights():
    """Weights 1/2 and 1/4: means 3/8 and 5/32."""
    log_rho_BT = torch.tensor([[0.5, 0.25]]).log()
    small = CORRECTIONS["truncate"](log_rho_BT, torch.ones(1, 2), level="token", high=2.0)
    moments = correction_metrics(small, torch.ones(1, 2, dtype=torch.bool))["correction/ess"]
    assert moments.tolist() == pytest.approx([3 / 8, 5 / 32])


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_row_without_tokens_has_weights_of_one(level):
    zero_BT = torch.zeros(1, 3)
    assert CORRECTIONS["truncate"](zero_BT, zero_BT, level=level, high=2.0).weights_BT.tolist() == [[1.0] * 3]


def step(correction, kl_weight):
    ids_BT, one = torch.zeros(1, 2, dtype=torch.long), torch.tensor(1.0)
    new_BT = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    batch = PolicyBatch(
        *(ids_BT, ids_BT, torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[-1.5, 0.0]]), torch.tensor([2.0])),
        *(one, 2 * one, one, 2 * one),
        ref_logprobs_BT=torch.tensor([[-1.3, -2.5]]),
    )
    kl = {"name": "k2_loss", "weight": kl_weight}
    output = Objective("group_mean", "token", "none", "token_mean", kl, correction=correction).loss(new_BT, batch)
    return output, torch.autograd.grad(output.loss, new_BT)[0][0].tolist()


def test_the_policy_term_is_weighted_the_kl_and_the_denominator_are_not():
    """rho = e^0.5 and e^-2: the second is rejected, and still one of two tokens. k2's slope is new - ref."""
    correction = {"name": "mask", "level": "token", "low": 0.5, "high": 5.0}
    output, gradient = step(correction, 0.1)
    assert gradient == pytest.approx([(-math.exp(0.5) + 0.1 * 0.3) / 2, (0.1 * 0.5) / 2], abs=1e-6)
    assert output.metrics["correction/cut"] == 0.5
    mean, square = output.metrics["correction/ess"].tolist()  # one token of two rejected: half the sample is left
    assert mean**2 / square == pytest.approx(0.5)
    off, plain = step(None, 0.0)
    assert plain == pytest.approx([-0.5, -0.5])
    assert not any(name.startswith("correction") for name in off.metrics)


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ({"name": "trunkate"}, r"correction: got 'trunkate'; did you mean 'truncate'"),
        ({"name": "truncate", "level": "tokens", "high": 2.0}, r"correction.level: got 'tokens'.*'geometric'"),
        ({"name": "mask", "level": "token", "high": 2.0}, r"needs low"),
    ],
)
def test_wrong_settings(correction, message):
    with pytest.raises(ConfigError, match=message):
        step(correction, 0.0)
