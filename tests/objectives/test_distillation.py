"""The generalised Jensen-Shannon divergence where tokens are excluded."""

import math

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.objectives import generalised_jsd


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_token_that_both_exclude_adds_nothing(beta):
    student, teacher = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[0.5, -0.5, -math.inf]])
    student.requires_grad_()
    got = generalised_jsd(student, teacher, beta=beta)
    got.sum().backward()
    short = student.detach()[:, :2].clone().requires_grad_()
    expected = generalised_jsd(short, teacher[:, :2], beta=beta)
    expected.sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(student.grad[:, :2], short.grad)
    assert student.grad[0, 2] == 0


def kl(p, q):
    return sum(a * math.log(a / b) if b else math.inf for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("student", "teacher"), [([0.5, 0.5, 0.0], [0.2, 0.3, 0.5]), ([0.2, 0.3, 0.5], [0.25, 0.75, 0.0])]
)
def test_a_token_that_one_alone_excludes(student, teacher, beta):
    """Infinite where the other one must hold it, and counted by the mixture."""
    mixture = [beta * t + (1 - beta) * s for s, t in zip(student, teacher, strict=True)]
    expected = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    expected = {0.0: kl(teacher, student), 1.0: kl(student, teacher)}.get(beta, expected)
    logits = (torch.tensor([p], dtype=torch.float64).log() for p in (student, teacher))
    assert generalised_jsd(*logits, beta=beta).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_outside(beta):
    with pytest.raises(ConfigError, match=r"valid: 0"):
        generalised_jsd(torch.zeros(1, 2), torch.zeros(1, 2), beta=beta)


def test_beta_is_a_share():
    with pytest.raises(ConfigError, match=r"beta: got 1.5; valid: 0"):
        generalised_jsd(torch.zeros(1, 2), torch.zeros(1, 2), beta=1.5)
