"""Log-probs and entropy of the chosen tokens: values and gradients against autograd, of whole logits and of a head."""

import copy

import pytest
import torch
from lit_kernels.logprobs import TILE
from torch import nn

from lit_reason.modules import chunked
from lit_reason.modules.logprobs import chosen_logprobs, head_logprobs


def reference(logits, target, temperature):
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, target[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, -0.3)])
def test_values_and_gradients(temperature, weights):
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(7, 11, generator=draw, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, 11, (7,), generator=draw)
    rows = torch.randn(7, generator=draw, dtype=torch.float64)

    def gradient(function):
        outputs = function(logits, target, temperature)
        loss = sum(w * (rows * out).sum() for w, out in zip(weights, outputs, strict=True) if w)
        return torch.autograd.grad(loss, logits)[0], *outputs

    for a, b in zip(gradient(chosen_logprobs), gradient(reference), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-11)


def test_probabilities_that_underflow_give_no_nan():
    logits = torch.tensor([[0.0, -300.0, 200.0]], requires_grad=True)
    logprob, entropy = chosen_logprobs(logits, torch.tensor([0]), 1.0)
    assert logprob.item() == -200 and entropy.item() == 0
    (logprob + entropy).sum().backward()
    assert logits.grad.tolist() == [[1.0, 0.0, -1.0]]


def test_bfloat16_logits_are_taken_in_float32_under_autocast_too():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    target = torch.tensor([0, 1, 4])
    with torch.autocast("cpu", torch.bfloat16):
        logprob, entropy = chosen_logprobs(logits, target, 1.0)
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((logprob, entropy), reference(logits.float(), target, 1.0))
    logprob.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank term, as adapters wrap a head; it does not tell its vocabulary."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def linear(**kwargs):
    return nn.Linear(4, 40, **{"bias": False} | kwargs)


def hooked():
    head = linear()
    head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))
    return head


def replaced():
    head = linear()
    head.forward = lambda x: 2 * nn.functional.linear(x, head.weight)
    return head


class Wrapped(torch.Tensor):
    """Any subclass, as quantised and sharded weights are."""


def wrapped():
    head = linear()
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Wrapped))
    return head


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


HEADS = {
    "plain": linear,
    "frozen": lambda: linear().requires_grad_(False),
    "bias": lambda: linear(bias=True),
    "adapted": lambda: Adapted(linear()),
    "hooked": hooked,
    "replaced": replaced,
    "wrapped": wrapped,
    "subclass": lambda: Doubled(4, 40, bias=False),
}


def head_step(head, dtype=torch.float64, temperature=0.7):
    """Outputs and gradients of 30 rows of width 4."""
    draw = torch.Generator().manual_seed(1)
    states = (3 * torch.randn(30, 4, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
    target = torch.randint(0, 40, (30,), generator=draw)
    rows = torch.randn(30, generator=draw, dtype=torch.float64)
    logprob, entropy = head_logprobs(head, states, target, temperature)
    (rows * (logprob - 0.3 * entropy)).sum().backward()
    return logprob, entropy, states.grad, *(p.grad for p in head.parameters() if p.requires_grad)


@pytest.fixture
def few_logits(monkeypatch):
    """At most 100 of the 1200 logits at once: rows of 2, or tiles of 7 by 12, both ragged at the end."""
    monkeypatch.setattr(chunked, "LOGITS", 100)
    monkeypatch.setitem(TILE, "cpu", (7, 12))


@pytest.mark.parametrize("kind", HEADS)
def test_few_logits_at_a_time_give_the_same(request, largest_tensor, kind):
    torch.manual_seed(0)
    head = HEADS[kind]().double()
    expected = head_step(head)
    head.zero_grad()  # to None: the expected gradients stay
    request.getfixturevalue("few_logits")
    with largest_tensor() as largest:
        got = head_step(head)
    assert largest() <= (120 if kind == "frozen" else 160)  # the states, 30 by 4; the weight or its gradient, 40 by 4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_only_the_plain_head_bypasses_its_forward(few_logits, monkeypatch):
    calls = []
    monkeypatch.setattr("lit_reason.modules.logprobs.linear_logprobs", lambda *args: calls.append(args) or (0, 0))
    states, target = torch.zeros(30, 4, dtype=torch.float64), torch.zeros(30, dtype=torch.long)
    for kind, make in HEADS.items():
        calls.clear()
        head_logprobs(make().double(), states, target, 1.0)
        assert bool(calls) == (kind in ("plain", "frozen")), kind


def test_where_all_logits_fit_nothing_changes_by_a_bit():
    torch.manual_seed(0)
    head, states, target = nn.Linear(4, 40, bias=False), torch.randn(30, 4), torch.arange(30)
    got = head_logprobs(head, states, target, 0.7)
    assert all(map(torch.equal, got, chosen_logprobs(head(states), target, 0.7)))
    gradients = [
        torch.autograd.grad(x.sum(), head.weight)[0] for x in (got[0], chosen_logprobs(head(states), target, 0.7)[0])
    ]
    assert torch.equal(*gradients)


def test_no_targets():
    head = nn.Linear(4, 40, bias=False)
    logprob, entropy = head_logprobs(head, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 1.0)
    assert logprob.shape == entropy.shape == (0,)


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_autocast_gives_what_whole_logits_give_within_their_own_error(request, kind):
    torch.manual_seed(0)
    head = HEADS[kind]().double()
    exact = head_step(head)

    def coarse():
        with torch.autocast("cpu", torch.bfloat16):
            return head_step(copy.deepcopy(head).float(), torch.float32)

    whole = coarse()
    request.getfixturevalue("few_logits")
    for a, b, c in zip(coarse(), whole, exact, strict=True):
        assert 0 < (a - c).norm() < 1.3 * (b - c).norm()
