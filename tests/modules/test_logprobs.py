"""Log-probs and entropy of the chosen tokens: values and gradients against autograd."""

import pytest
import torch

from lit_reason.modules.logprobs import chosen_logprobs


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
