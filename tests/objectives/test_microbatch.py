"""Splitting an optimizer step into micro-batches changes no gradient, for every shipped algorithm and aggregation."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lit_reason.objectives import AGGREGATIONS, Objective
from lit_reason.types import PolicyBatch

ALGORITHMS = sorted((Path(__file__).resolve().parents[2] / "conf" / "algorithm").glob("*.yaml"))
B, G, T, D = 16, 4, 9, 12


def load(path, **changes) -> Objective:
    config = OmegaConf.load(path)
    config.pop("_target_")
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    return Objective(**config)


def make_step(objective):
    """A whole step in float32 with ragged lengths, one empty row, and NaN wherever nobody may look."""
    g = torch.Generator().manual_seed(0)
    # Lengths grow with the row, so that equal splits by rows hold very different numbers of tokens.
    lengths_B = torch.tensor([1, 1, 2, 0, 2, 3, 3, 4, 5, 5, 6, 7, 8, 9, 9, 9])
    mask_BT = (torch.arange(T) < lengths_B[:, None]).float()
    features_BTD = torch.randn(B, T, D, generator=g)
    weight_D = (torch.randn(D, generator=g) * 0.2).requires_grad_()
    entropy_D = torch.randn(D, generator=g).requires_grad_()
    base_BT = -1.5 + (features_BTD @ weight_D).detach()
    hidden_BT = torch.where(mask_BT > 0, torch.zeros(B, T), torch.tensor(torch.nan))
    old_BT = base_BT + 0.3 * torch.randn(B, T, generator=g) + hidden_BT
    ref_BT = base_BT + 0.3 * torch.randn(B, T, generator=g) + hidden_BT
    group_B = torch.arange(B) // G
    rewards_BR = torch.stack([torch.rand(B, generator=g), (torch.rand(B, generator=g) > 0.5).float()], 1)
    value_D, divergence_D = (torch.randn(D, generator=g).requires_grad_() for _ in range(2))
    values_BT = (features_BTD @ value_D).detach() + 0.3 * torch.randn(B, T, generator=g) + hidden_BT
    assessed = objective.assess(
        rewards_BR, torch.tensor([1.0, 0.5]), group_B, mask_BT, None, old_BT, ref_BT, values_BT, rewards_BR.flip(0)
    )
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    batch = PolicyBatch(
        ids_BT,
        ids_BT,
        mask_BT,
        assessed.advantages,
        rollout_logprobs_BT=old_BT,
        group_tokens_B=mask_BT.sum(1).view(-1, G).sum(1).repeat_interleave(G),
        sequences_total=torch.tensor(float(B)),
        tokens_total=mask_BT.sum(),
        prompts_total=torch.tensor(float(B // G)),
        max_completion=torch.tensor(float(T)),
        old_logprobs_BT=old_BT,
        ref_logprobs_BT=ref_BT,
        values_BT=values_BT,
        returns_BT=assessed.returns_BT,
        marked_BT=assessed.marked_BT,
    )

    def forward(rows):
        """New log-probs, entropy, values, divergence to a teacher."""
        x = features_BTD[rows]
        hidden = hidden_BT[rows]
        yield -1.5 + x @ weight_D + hidden
        yield (x @ entropy_D).square()
        yield x @ value_D + hidden
        yield (x @ divergence_D).square() + hidden

    return batch, forward, (weight_D, entropy_D, value_D, divergence_D)


def rows_of(batch, rows):
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: v[rows] for name, v in parts.items() if v is not None and v.dim() > 0})


def gradient(objective, batch, forward, parameters, pieces, local_totals=False):
    """Gradient of the sum of the micro-batches' losses (what accumulation does), flattened."""
    total = torch.zeros(sum(p.numel() for p in parameters))
    for rows in torch.arange(B).chunk(pieces):
        part = rows_of(batch, rows)
        if local_totals:
            part = replace(part, tokens_total=part.mask_BT.sum() * pieces)
        new_BT, *others = forward(rows)
        loss = objective.loss(new_BT, part, *others).loss
        assert loss.isfinite()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        total += torch.cat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])
    return total


def assert_split_invariant(objective):
    batch, forward, parameters = make_step(objective)
    whole = gradient(objective, batch, forward, parameters, 1)
    assert whole.isfinite().all()
    assert whole.norm() > 1e-3
    for pieces in (2, 4, 8, 16):
        split = gradient(objective, batch, forward, parameters, pieces)
        assert (split - whole).norm() <= 1e-5 * whole.norm(), pieces


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda p: p.stem)
def test_shipped_algorithm(path):
    assert_split_invariant(load(path))


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda p: p.stem)
def test_shipped_algorithm_with_kl_and_entropy(path):
    assert_split_invariant(load(path, **{"kl.weight": 0.1, "entropy_coef": 0.05}))


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_aggregation(name):
    assert_split_invariant(load(ALGORITHMS[0].with_name("grpo.yaml"), aggregation=name))


def test_per_micro_batch_denominator_would_be_noticed():
    """The naive token mean is another objective: the test above would fail with it."""
    objective = load(ALGORITHMS[0].with_name("dapo.yaml"))
    batch, forward, parameters = make_step(objective)
    whole = gradient(objective, batch, forward, parameters, 1)
    naive = gradient(objective, batch, forward, parameters, 4, local_totals=True)
    assert (naive - whole).norm() > 0.1 * whole.norm()


def test_shipped_algorithms_are_found():
    assert {"grpo", "dr_grpo", "dapo", "gdpo"} <= {path.stem for path in ALGORITHMS}
