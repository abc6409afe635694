"""Supervised modules: the masked cross-entropy by hand, the balance loss, what they refuse."""

import math

import pytest
import torch

from lit_reason.errors import ConfigError, NonFiniteError
from lit_reason.modules import PretrainModule, SFTModule
from lit_reason.modules.supervised import real_tokens
from lit_reason.optim import AdamW
from lit_reason.types import TokenBatch


@pytest.fixture
def batch() -> TokenBatch:
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8], dtype=torch.float32)
    return TokenBatch(ids[:, :-1], ids[:, 1:], mask)


def by_hand(model, batch) -> tuple[float, float]:
    """Mean of -log p(target) over the tokens that count, and the share where it is the most likely."""
    total, right, count = 0.0, 0, 0
    logits_BTV = model(batch.input_ids_BT)
    for b in range(3):
        for t in range(8):
            if batch.mask_BT[b, t]:
                row, target = logits_BTV[b, t].tolist(), int(batch.target_ids_BT[b, t])
                total += math.log(sum(math.exp(x) for x in row)) - row[target]
                right += row[target] == max(row)
                count += 1
    assert count == 10
    return total / count, right / count


def test_the_loss_is_the_masked_cross_entropy(make_model, batch, fit):
    model = make_model(first_dense=2)  # dense: no balance loss
    with torch.no_grad():
        expected, right = by_hand(model, batch)
    logged = fit(SFTModule(model, AdamW(lr=1e-3)), [batch]).metrics[0]
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["token_accuracy"] == pytest.approx(right)
    assert "balance_loss" not in logged


def test_the_balance_loss_enters_with_its_coefficient(make_model, batch, fit):
    logged = fit(PretrainModule(make_model(balance_loss=0.5, first_dense=0), AdamW()), [batch]).metrics[0]
    with torch.no_grad():
        cross_entropy, _ = by_hand(make_model(first_dense=0).eval(), batch)
    assert 0.5 < logged["balance_loss"] < 4
    assert logged["loss"] == pytest.approx(cross_entropy + 0.5 * 2 * logged["balance_loss"], rel=1e-5)


def test_the_loss_of_multi_token_prediction_by_hand(make_model, batch, fit):
    """Depth k's position i counts where its target, k tokens further on, does."""
    model = make_model(first_dense=2, mtp_depth=2, mtp_loss=0.25)
    with torch.no_grad():
        expected, _ = by_hand(model, batch)
        hidden = model.hidden(batch.input_ids_BT)
        means = []
        for k, further in enumerate(model.further(hidden, batch.target_ids_BT), start=1):
            logprobs_BTV = model.head(further.states_BTD).log_softmax(-1)
            terms = [
                -float(logprobs_BTV[b, t, batch.target_ids_BT[b, t + k]])
                for b in range(3)
                for t in range(8 - k)
                if batch.mask_BT[b, t + k]
            ]
            means.append(sum(terms) / len(terms))
    logged = fit(SFTModule(model, AdamW(lr=1e-3)), [batch]).metrics[0]
    assert logged["mtp_loss"] == pytest.approx(sum(means) / 2, rel=1e-5)
    assert logged["loss"] == pytest.approx(expected + 0.25 * sum(means) / 2, rel=1e-5)


def test_a_prediction_modules_experts_are_balanced_too(make_model, batch, fit):
    """Its balance loss enters the loss, and its router counts what depth k really sees: 5 - k and 8 - k tokens."""
    model, counted = make_model(first_dense=0, mtp_depth=2, balance_loss=0.5, mtp_loss=0.0), []
    with torch.no_grad():
        expected, _ = by_hand(model.eval(), batch)
    model.train()
    routers = model.routers()
    for router in routers:
        router.update_bias = lambda rate, router=router: counted.append(int(router.load_E.sum()))
    logged = fit(SFTModule(model, AdamW(lr=1e-3)), [batch]).metrics[0]
    k = routers[0].k
    assert counted == [*[13 * k] * (len(routers) - 2), 11 * k, 9 * k]
    assert logged["loss"] == pytest.approx(expected + 0.5 * len(routers) * logged["balance_loss"], rel=1e-5)


def test_biases_move_and_padding_is_not_counted(make_model, batch, fit):
    seen = []
    model = make_model()
    module = PretrainModule(model, AdamW(), router_bias_rate=1e-3)
    update = model.routers()[0].update_bias
    model.routers()[0].update_bias = lambda rate: (seen.append(float(model.routers()[0].load_E.sum())), update(rate))
    record = fit(module, [batch, batch])
    # Row 0 is real up to its 5th position, row 1 up to its 8th, row 2 nowhere; 2 experts a token.
    assert seen == [(5 + 8) * 2] * 2
    assert record.bias[0][0].abs().max() == pytest.approx(1e-3)


def test_real_tokens_reach_to_the_last_that_counts():
    counts = torch.tensor([[False, True, False, True, False], [False] * 5])
    assert real_tokens(counts).tolist() == [[True, True, True, True, False], [False] * 5]


def test_accumulation_and_broken_numbers_are_refused(make_model, batch, fit):
    with pytest.raises(ConfigError, match=r"type trainer\.accumulate_grad_batches=1"):
        fit(SFTModule(make_model(), AdamW()), [batch] * 2, accumulate=2)
    model = make_model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"Lower optimizer\.lr"):
        fit(SFTModule(model, AdamW()), [batch])
