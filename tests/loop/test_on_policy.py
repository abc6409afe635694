"""A real run under a real Trainer: rollouts come from the newest weights, and a resumed run is the same run."""

import copy
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_reason.loop import RoundShape
from lit_reason.models.checksum import checksum
from lit_reason.modules import EMA, Refreshed
from lit_reason.modules.policy import ROUND_KEY


class Weights(L.Callback):
    """A copy of the policy after every optimizer step, the initial one first."""

    def __init__(self):
        self.after = {}

    def on_train_start(self, trainer, pl_module):
        self.after[0] = copy.deepcopy(pl_module.model)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step not in self.after:
            self.after[trainer.global_step] = copy.deepcopy(pl_module.model)


@torch.no_grad()
def largest_difference(model, prompt_ids, completion, temperature) -> float:
    ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
    table = (model.eval()(ids)[0, :-1] / temperature).log_softmax(-1)[len(prompt_ids) - 1 :]
    expected = table.gather(1, ids[0, len(prompt_ids) :, None]).squeeze(1)
    return (expected - torch.tensor(completion.logprobs)).abs().max().item()


@pytest.mark.parametrize("minibatches", [1, 3])
def test_a_round_is_sampled_from_the_weights_after_the_last_step(real_run, minibatches):
    weights, pushed = Weights(), []
    shape = RoundShape(rounds=3, prompts_per_round=3, group_size=4, minibatches=minibatches, micro_batches=2)
    run = real_run("run", shape=shape, callbacks=[weights], on_push=lambda model: pushed.append(checksum(model)))
    run.trainer.fit(run.policy, run.loop)
    steps = [r * minibatches for r in range(3)]
    assert run.trainer.global_step == 3 * minibatches and sorted(weights.after) == list(range(3 * minibatches + 1))
    assert pushed == [checksum(weights.after[s]) for s in steps]
    assert len(set(pushed)) == 3
    tokens = {p.id: p.token_ids for p in run.loop.prompts.prompts}
    for r, completions in enumerate(run.completions):
        assert {c.version for c in completions} == {r}
        right = [largest_difference(weights.after[steps[r]], tokens[c.prompt_id], c, 0.9) for c in completions]
        assert max(right) < 1e-4
        if r:  # the comparison can tell: weights one step older give other numbers
            stale = [largest_difference(weights.after[steps[r] - 1], tokens[c.prompt_id], c, 0.9) for c in completions]
            assert max(stale) > 1e-2


@pytest.mark.parametrize(
    ("algorithm", "refills", "reference", "changes"),
    [
        ("gdpo", 1, None, {}),
        ("ppo", 0, None, {}),
        (
            "grpo",
            0,
            lambda: EMA(0.8),
            {"kl": {"name": "k2_loss", "weight": 0.1, "target": 0.01}, "entropy_target": 4.0},
        ),
        ("kl_cov", 0, lambda: Refreshed(2), {"kl": {"name": "k3_loss", "weight": 0.1}}),
        ("remax", 0, None, {"clip": "none"}),
    ],
)
def test_stopped_in_the_middle_of_a_round_and_resumed_is_the_same_run(real_run, algorithm, refills, reference, changes):
    """What a resume must carry besides the weights: the critic, a moving reference, coefficients, marks, refills."""
    shape = RoundShape(rounds=4, prompts_per_round=3, group_size=4, minibatches=3, micro_batches=2, refills=refills)

    def make(name, **kwargs):
        return real_run(name, algorithm, reference=None if reference is None else reference(), **kwargs, **changes)

    whole = make("whole", shape=shape)
    whole.trainer.fit(whole.policy, whole.loop)
    assert whole.trainer.global_step == 12 and shape.updates == 3

    saver = ModelCheckpoint(every_n_train_steps=1, save_top_k=1, save_last=True)
    first = make("first", shape=shape, callbacks=[saver], max_steps=5)  # 5 = 3 + 2: inside the second round
    first.policy._seconds = 3600.0  # more than this test can take: it tells what was saved from what was added
    first.trainer.fit(first.policy, first.loop)
    assert first.trainer.global_step == 5 and len(first.completions) == 2

    saved = torch.load(saver.last_model_path, weights_only=True)[ROUND_KEY]
    assert 3600 < saved["seconds"] <= first.policy.seconds
    second = make("second", shape=shape, callbacks=[ModelCheckpoint(every_n_train_steps=1)])
    began = time.perf_counter()
    second.trainer.fit(second.policy, second.loop, ckpt_path=saver.last_model_path)
    took = time.perf_counter() - began
    assert second.trainer.global_step == 12 and len(second.completions) == 2

    generated = sum(len(c.token_ids) for completions in whole.completions for c in completions)
    assert second.policy.completion_tokens == whole.policy.completion_tokens == generated
    assert 0 < second.policy.seconds - saved["seconds"] <= took

    resumed = first.completions + second.completions
    for a, b in zip(whole.completions, resumed, strict=True):
        assert [(c.token_ids, c.logprobs, c.seed) for c in a] == [(c.token_ids, c.logprobs, c.seed) for c in b]
    for a, b in zip(whole.rewards, first.rewards + second.rewards, strict=True):
        assert torch.equal(a, b)
    for (name, a), b in zip(whole.policy.state_dict().items(), second.policy.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert checksum(first.policy.model) != checksum(second.policy.model) == checksum(whole.policy.model)
    assert second.policy.objective.coefficients.state_dict() == whole.policy.objective.coefficients.state_dict()
    with second.policy.reference.model() as one, whole.policy.reference.model() as other:
        assert checksum(one) == checksum(other)
