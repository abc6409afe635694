"""New weights reach an engine between two tokens: a small real engine, a real policy, a real Trainer."""

import copy
import threading

import lightning as L
import pytest
import torch

from lit_reason.loop import RoundShape
from lit_reason.models.checksum import checksum
from lit_reason.modules import Refreshed
from lit_reason.rollout.sampling import draw, uniforms
from lit_reason.types import Completion

LIMIT = 20  # seconds after which a wait is a failure


class TokenEngine:
    """One row after another, one token after another, without a cache. In its second generation it waits for new
    weights at token 3 of row 2."""

    in_flight = True

    def __init__(self):
        self.weights, self.changed, self.held = (None, -1), threading.Condition(), threading.Event()
        self.calls = 0

    def push(self, model, version):
        with self.changed:
            self.weights = (copy.deepcopy(model).eval(), version)
            self.changed.notify_all()

    def version(self):
        return self.weights[1]

    def hold(self):
        self.held.set()
        with self.changed:
            assert self.changed.wait_for(lambda: self.weights[1] == 1, LIMIT)

    @torch.no_grad()
    def generate(self, prompts, sampling, seeds, sample_idx, progress=None):
        self.calls += 1
        completions = []
        for row, (prompt, seed, idx) in enumerate(zip(prompts, seeds, sample_idx, strict=True)):
            ids, logprobs, versions = list(prompt.token_ids), [], []
            for step, uniform_1 in enumerate(uniforms([seed], sampling.max_tokens)[0][:, None]):
                if (self.calls, row, step) == (2, 2, 3):
                    self.hold()
                model, version = self.weights
                token, logprob = draw(model(torch.tensor([ids]))[:, -1], sampling, uniform_1)
                ids.append(token.item())
                logprobs.append(logprob.item())
                versions.append(version)
            switches = tuple((t, new) for t, new in enumerate(versions) if t and new != versions[t - 1])
            new_ids = tuple(ids[len(prompt.token_ids) :])
            completions.append(
                Completion(prompt.id, idx, new_ids, tuple(logprobs), "", "length", versions[0], seed, switches=switches)
            )
        return completions


class Trace(L.Callback):
    """Lets the first round's training end only when the next generation stands at its third token."""

    def __init__(self, engine):
        self.engine, self.after = engine, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == len(self.after):
            self.after.append(copy.deepcopy(pl_module.model).eval())
        assert self.engine.held.wait(LIMIT)


@torch.no_grad()
def logprobs(model, prompt_ids, completion, temperature):
    ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
    table = (model(ids)[0, :-1] / temperature).log_softmax(-1)[len(prompt_ids) - 1 :]
    return table.gather(1, ids[0, len(prompt_ids) :, None]).squeeze(1)


def test_the_rest_of_a_generation_comes_from_the_newer_weights(real_run):
    engine = TokenEngine()
    trace = Trace(engine)
    shape = RoundShape(rounds=2, prompts_per_round=3, group_size=4, micro_batches=2, staleness=1, in_flight=True)
    run = real_run("run", shape=shape, callbacks=[trace], engine=engine)
    run.trainer.fit(run.policy, run.loop)
    old, new = trace.after
    assert checksum(old) != checksum(new)
    assert [(c.version, c.switches) for c in run.completions[1]] == [(0, ()), (0, ()), (0, ((3, 1),)), *[(1, ())] * 9]
    tokens = {p.id: p.token_ids for p in run.loop.prompts.prompts}
    for row, completion in enumerate(run.completions[1]):
        given = torch.tensor(completion.logprobs)
        by_old, by_new = (logprobs(m, tokens[completion.prompt_id], completion, 0.9) for m in (old, new))
        turn = {0: 10, 1: 10, 2: 3}.get(row, 0)
        assert (given - torch.cat([by_old[:turn], by_new[turn:]])).abs().max() < 1e-5
        assert (given - torch.cat([by_new[:turn], by_old[turn:]])).abs().max() > 1e-3
    logged = run.trainer.callback_metrics
    assert logged["rollout/age/mean"] == pytest.approx((10 + 10 + 3) / 120)
    assert logged["rollout/age/max"] == 1


def test_a_frozen_push_brings_the_weights_of_its_time(real_run):
    shape = RoundShape(rounds=2, prompts_per_round=3, group_size=4, micro_batches=2, staleness=2)
    run = real_run("run", shape=shape, reference=Refreshed(7))

    def change():
        with torch.no_grad():
            for parameter in run.policy.model.parameters():
                parameter.add_(1.0)

    change()
    before, later = checksum(run.policy.model), run.loop.stages.freeze(7)
    change()
    with run.policy.reference.model() as reference:
        assert checksum(reference) == before, "the reference is refreshed at once"
    later()
    assert checksum(run.engine.model) == before != checksum(run.policy.model)
    assert run.engine.version() == 7


def test_what_an_engine_can_is_asked_of_it(real_run):
    shape = RoundShape(rounds=2, prompts_per_round=3, group_size=4, micro_batches=2)
    assert real_run("tokens", shape=shape, engine=TokenEngine()).loop.stages.in_flight
    assert not real_run("builtin", shape=shape).loop.stages.in_flight
