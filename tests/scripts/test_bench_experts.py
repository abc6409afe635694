"""The forms that bench_experts.py times compute the same."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def bench(load):
    return load("bench_experts")


def test_forms_and_their_gradients_are_the_loops(bench):
    sizes = (5, 24, 2, 16, 8)
    leaves, grad = bench.problem(sizes, torch.float32)
    results = {}
    for name, form in bench.FORMS.items():
        x, weights, gate_up, down = (leaf.detach().requires_grad_() for leaf in leaves)
        out = form(x, bench.choices(sizes, 3), weights, gate_up, down)
        results[name] = out, *torch.autograd.grad(out, (x, weights, gate_up, down), grad)
    for name, found in results.items():
        for one, right in zip(found, results["loop"], strict=True):
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5, msg=name)


def test_choices_are_new_with_every_seed_and_uneven(bench):
    first, second = (bench.choices((32, 4096, 4, 1, 1), seed).flatten().bincount(minlength=32) for seed in (0, 1))
    assert not torch.equal(first, second) and first.max() > 1.5 * first.float().mean()
