"""The divergence of two heads, some rows at a time, against `generalised_jsd` on whole logits."""

import pytest
import torch
from torch import nn

from lit_reason.errors import ConfigError
from lit_reason.modules import chunked
from lit_reason.modules.divergence import head_divergence
from lit_reason.objectives import generalised_jsd


@pytest.fixture
def pair():
    """A student of width 5 and a teacher of width 6, 7 rows, 11 tokens."""
    torch.manual_seed(0)
    heads = [nn.Linear(width, 11, bias=bias).double() for width, bias in ((5, False), (6, True))]
    states = [2 * torch.randn(7, width, dtype=torch.float64, requires_grad=True) for width in (5, 6)]
    return heads, [x.detach().requires_grad_() for x in states]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("logits", [33, 1000])  # rows of 3, 3, 1; and all at once
def test_as_of_whole_logits(monkeypatch, pair, beta, logits):
    monkeypatch.setattr(chunked, "LOGITS", logits)
    (student, teacher), (mine, theirs) = pair
    weights = torch.arange(1, 8).double().cos()
    expected = generalised_jsd(student(mine) / 0.7, (teacher(theirs) / 0.7).detach(), beta=beta)
    gradients = torch.autograd.grad((weights * expected).sum(), (mine, student.weight))
    got = head_divergence(student, mine, teacher, theirs, beta=beta, temperature=0.7)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    (weights * got).sum().backward()
    torch.testing.assert_close((mine.grad, student.weight.grad), gradients, atol=1e-12, rtol=1e-12)
    assert theirs.grad is None and teacher.weight.grad is None and teacher.bias.grad is None


def test_bfloat16_logits_are_compared_in_float32(monkeypatch, pair):
    monkeypatch.setattr(chunked, "LOGITS", 33)
    (student, teacher), (mine, theirs) = pair
    for head in (student, teacher):
        head.bfloat16()
    mine, theirs = mine.detach().bfloat16(), theirs.detach().bfloat16()
    got = head_divergence(student, mine, teacher, theirs, beta=0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, generalised_jsd(student(mine).float(), teacher(theirs).float(), beta=0.5))


def test_no_tensor_holds_all_logits(monkeypatch, largest_tensor):
    monkeypatch.setattr(chunked, "LOGITS", 100)
    student, teacher = nn.Linear(4, 40, bias=False), nn.Linear(4, 40, bias=False)
    with largest_tensor() as largest:
        head_divergence(student, torch.ones(30, 4), teacher, torch.ones(30, 4), beta=0.5).sum().backward()
    assert largest() <= 160  # a weight; a chunk of two rows has 80 logits and their mixture 160


def test_beta_is_a_share(pair):
    (student, teacher), (mine, theirs) = pair
    with pytest.raises(ConfigError, match=r"beta: got -1; valid: 0"):
        head_divergence(student, mine, teacher, theirs, beta=-1)
