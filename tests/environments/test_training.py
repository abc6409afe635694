"""Rounds of reinforcement learning with an environment: its tokens are read, never learnt from."""

from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lit_reason.checkpoint import SafeCheckpointIO
from lit_reason.data import PromptCursor
from lit_reason.loop import RolloutLoop, RoundShape
from lit_reason.loop.batching import collate, split
from lit_reason.modules import PolicyModule
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.rewards import Length, Rubric
from lit_reason.rewards.base import ItemReward
from lit_reason.rollout import Sampling, request_seed
from lit_reason.types import Completion, Prompt, RewardState

ALGORITHMS = Path(__file__).parents[2] / "conf" / "algorithm"


def objective(algorithm, **changes):
    axes = yaml.safe_load((ALGORITHMS / f"{algorithm}.yaml").read_text())
    axes.pop("_target_")
    return Objective(**axes | changes)


class Even(ItemReward):
    def score(self, prompt, completion):
        return sum(t % 2 == 0 for t in completion.token_ids) / len(completion.token_ids)


@pytest.fixture
def run(play, echo, prompts, model, tmp_path):
    """`run(algorithm)`: two rounds; the completions, the losses and the last batches that were trained on."""

    def make(algorithm, prompt_count=4, **changes):
        policy = PolicyModule(model, AdamW(lr=2**-6), objective(algorithm, **changes), temperature=0.9)
        rubric = Rubric({"even": Even(), "length": Length(max_tokens=60)}, max_fault_fraction=0.5)
        sampling, shape = Sampling(0.9, max_tokens=60), RoundShape(2, 4, 4, micro_batches=2)
        engine, seen, groups, losses = play(echo(max_turns=3)), [], [], []

        def on_round(finished):
            groups.extend(finished.groups)
            policy.on_round(finished)

        loop = RolloutLoop(
            PromptCursor(prompts(prompt_count), seed=5), policy.stages(engine, sampling, rubric.judge), shape,
            request_seed=request_seed, seed=1, max_completion=60, pad_id=256, on_round=on_round,
        )  # fmt: skip

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                seen.append(batch)
                losses.append(float(outputs["loss"]))

        L.Trainer(
            default_root_dir=tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[Watch()], logger=False,
            plugins=[SafeCheckpointIO()], accelerator="cpu", enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(policy, loop)  # fmt: skip
        return policy, groups, losses, seen

    return make


@pytest.mark.parametrize("algorithm", ["grpo", "gdpo", "ppo", "gspo", "reinforce_pp", "kl_cov", "gmpo", "rloo"])
def test_two_rounds_train_on_the_policys_tokens_alone(run, model, algorithm):
    before = [p.detach().clone() for p in model.parameters()]
    changes = {"kl": {"name": "k1_token_reward", "weight": 0.1}} if algorithm == "reinforce_pp" else {}
    _, groups, losses, batches = run(algorithm, **changes)
    assert len(losses) == 4 and all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    completions = [c for group in groups for c in group.completions]
    assert sum(c.mask is not None for c in completions) > 16, "the case must have turns"
    own = sum(sum(c.mask or [1] * len(c.token_ids)) for c in completions)
    assert sum(float(b.mask_BT.sum()) for b in batches) == own < sum(len(c.token_ids) for c in completions)
    assert sorted({float(b.tokens_total) for b in batches}) == sorted(
        {float(sum(sum(c.mask or [1] * len(c.token_ids)) for c in completions[i : i + 16])) for i in (0, 16)}
    )


def rows(tokenizer):
    """Four completions of two prompts, with an answer of the environment in three of them."""
    prompts = [Prompt("a", "", "", "", (1, 2, 3))] * 2 + [Prompt("b", "", "", "", (4, 5))] * 2
    made = [([7, 8], [60, 61, 62], [9, 10, 11]), ([12], [63], [13]), ([14, 15, 16], [], []), ([17], [64, 65], [18])]
    completions = []
    for prompt, (first, answer, last) in zip(prompts, made, strict=True):
        ids, mask = (*first, *answer, *last), (1,) * len(first) + (0,) * len(answer) + (1,) * len(last)
        logprobs = tuple(-5.0 * m for m in mask)
        completions.append(Completion(prompt.id, 0, ids, logprobs, "", "stop", 0, 0, mask if answer else None))
    return prompts, completions


def loss_and_gradients(policy, batch):
    policy.zero_grad()
    found = policy.forward(batch)
    loss = policy.objective.loss(found.logprobs_BT, batch, *found[1:]).loss
    loss.backward()
    return found, loss.detach(), [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


@pytest.fixture
def batch(tokenizer):
    prompts, completions = rows(tokenizer)
    whole = collate(prompts, completions, max_completion=9, pad_id=256)
    whole.advantages_BT = torch.randn(whole.mask_BT.shape, generator=torch.Generator().manual_seed(1))
    return split(whole, range(4), torch.tensor([0, 0, 1, 1]), micro_batches=1)[0]


def test_collate_masks_what_the_environment_wrote(tokenizer):
    whole = collate(*rows(tokenizer), max_completion=9, pad_id=256)
    assert whole.mask_BT.tolist() == [
        [0, 0, 1, 1, 0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert whole.tokens_total == 5 + 2 + 3 + 2 and whole.rollout_logprobs_BT.isfinite().all()


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "cispo", "dapo", "dr_grpo", "gmpo"])
def test_targets_that_the_environment_wrote_change_neither_loss_nor_gradient(model, batch, algorithm):
    policy = PolicyModule(model, AdamW(lr=1e-3), objective(algorithm, kl={"name": "k3_loss", "weight": 0.0}))
    holes = (batch.mask_BT == 0) & (batch.target_ids_BT >= 60)
    assert holes.any()
    found, loss, gradients = loss_and_gradients(policy, batch)
    assert found.logprobs_BT[holes].eq(0).all() and found.entropy_BT[holes].eq(0).all()
    upstream = torch.autograd.grad(
        policy.objective.loss(leaf := found.logprobs_BT.detach().requires_grad_(), batch, found.entropy_BT).loss, leaf
    )[0]
    assert upstream[batch.mask_BT == 0].eq(0).all() and upstream[batch.mask_BT == 1].ne(0).all()
    other = replace(
        batch,
        target_ids_BT=batch.target_ids_BT.masked_fill(holes, 200),
        rollout_logprobs_BT=batch.rollout_logprobs_BT.masked_fill(holes, -9.0),
        advantages_BT=batch.advantages_BT.masked_fill(batch.mask_BT == 0, 99.0),
    )
    _, same_loss, same = loss_and_gradients(policy, other)
    assert torch.equal(loss, same_loss) and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    # but they are read: another answer gives other log-probs to what follows
    read = batch.input_ids_BT.masked_fill(batch.input_ids_BT == 61, 99)
    assert not torch.equal(policy.forward(replace(batch, input_ids_BT=read)).logprobs_BT, found.logprobs_BT)


def test_gradients_of_packed_rows_with_holes_equal_those_of_a_padded_forward(model, batch):
    """GRPO in its first update, without a KL: -1/B sum_b 1/n_b sum_t A log p over the n_b tokens of the policy."""
    policy = PolicyModule(model, AdamW(lr=1e-3), objective("grpo", kl={"name": "k3_loss", "weight": 0.0}))
    _, _, gradients = loss_and_gradients(policy, batch)
    model.zero_grad()
    table = model(batch.input_ids_BT).log_softmax(-1).gather(2, batch.target_ids_BT[..., None]).squeeze(2)
    weights = batch.mask_BT / batch.mask_BT.sum(1, keepdim=True) / len(batch)
    (-(weights * batch.advantages_BT * table).sum()).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(expected) == len(gradients) > 5
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_what_a_failed_environment_left_is_not_scored_and_not_learnt_from(play, echo, prompts):
    asked, seeds = prompts(4), [11, 12, 13, 14]
    completions = play(echo()).generate(asked, Sampling(1.0, max_tokens=40), seeds)
    rubric = Rubric({"even": Even(), "length": Length(max_tokens=60)}, max_fault_fraction=0.5)
    scores = rubric.score(asked, completions)
    assert scores.valid_B.tolist() == [True, True, False, True] and scores.total_B[2].isnan()
    assert scores.states_BR[2].tolist() == [RewardState.ERROR] * 2
    assert scores.messages[2, "even"] == "environment: out of order" and rubric.faults["even"]["ERROR"] == 1
