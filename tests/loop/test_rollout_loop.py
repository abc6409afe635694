"""The loop on stub stages: order, totals, state, rows that could not be judged."""

import copy
import functools
import io
import operator
from dataclasses import replace

import pytest
import torch

from lit_reason.errors import ConfigError, RolloutError
from lit_reason.loop import RoundShape, metrics
from lit_reason.types import PolicyBatch

SHAPE = {"rounds": 3, "prompts_per_round": 4, "group_size": 3, "epochs": 2, "minibatches": 2, "micro_batches": 3}


def tensors(batch: PolicyBatch) -> dict:
    return {n: getattr(batch, n) for n in PolicyBatch.__dataclass_fields__}


def assert_same(a: list[PolicyBatch], b: list[PolicyBatch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name, value in tensors(x).items():
            other = tensors(y)[name]
            assert (value is None and other is None) or torch.equal(value, other), name


def test_length_and_order_of_the_stages(stub, make_loop):
    stages = stub()
    loop = make_loop(stages.stages(), **SHAPE)
    assert len(loop) == 3 * (2 * 2 * 3)
    assert stages.events == []
    next(loop)
    forward = ["old"] * 6  # 12 rows in the training's micro-batch size, 12 / (2 * 3)
    assert stages.events == ["push 0", "generate", "score", *forward, "assess"]
    for _ in range(11):
        next(loop)
    assert "push 1" not in stages.events, "the next round must wait until its first batch is asked for"
    next(loop)
    assert stages.events[-len(forward) - 4] == "push 1"
    assert sum(1 for _ in loop) == 23 and [e for e in stages.events if "push" in e] == ["push 0", "push 1", "push 2"]


def test_totals_belong_to_the_step_and_every_epoch_deals_whole_groups_once(stub, make_loop):
    rounds = list(make_loop(stub().stages(), **SHAPE))
    orders = []
    for start in range(0, len(rounds), 3 * 2):  # an epoch is 2 steps of 3 micro-batches
        epoch, dealt = rounds[start : start + 6], []
        for step in (epoch[:3], epoch[3:]):
            owner = torch.cat([b.input_ids_BT[:, 0] for b in step])
            tokens = torch.cat([b.mask_BT.sum(1) for b in step])
            assert sorted(owner.bincount()[owner.unique()].tolist()) == [3, 3]
            dealt.append(owner.unique().tolist())
            for b in step:
                assert len(b) == 2
                assert (b.sequences_total, b.tokens_total, b.prompts_total) == (6, tokens.sum(), 2)
                for row, group in enumerate(b.input_ids_BT[:, 0]):
                    assert b.group_tokens_B[row] == tokens[owner == group].sum()
                assert torch.equal(b.old_logprobs_BT, b.target_ids_BT / 100.0)  # cut and permuted together
        assert len(set(functools.reduce(operator.iadd, dealt, []))) == 4
        orders.append(dealt)
    assert orders[0] != orders[1] or orders[2] != orders[3], "epochs shuffle anew"


def test_state_in_the_middle_of_a_round_continues_bit_for_bit(stub, make_loop):
    whole = list(make_loop(stub().stages(), **SHAPE))
    loop = make_loop(stub().stages(), **SHAPE)
    first = [next(loop) for _ in range(17)]  # 5 batches into the second round
    file = io.BytesIO()
    torch.save(loop.state_dict(), file)
    file.seek(0)
    stages = stub()
    resumed = make_loop(stages.stages(), **SHAPE)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    rest = list(resumed)
    assert_same(whole, first + rest)
    assert stages.events[0] == "push 2", "the round in progress must not be generated again"


def test_experts_are_dealt_with_their_rows_and_kept_by_the_state(stub, make_loop):
    def make(stages):
        def generate(prompts, seeds, samples):
            told = []
            for prompt, c in zip(prompts, stages.generate(prompts, seeds, samples), strict=True):
                read = torch.tensor((prompt.token_ids + c.token_ids)[:-1], dtype=torch.int16)
                told.append(replace(c, experts_SLK=torch.stack((read, read + 100), -1)[:, None]))
            return told

        def old_logprobs(batch):
            known = batch.experts_BTLK[..., 0, 0] >= 0  # the rows of a micro-batch, still padded to the round's length
            assert torch.equal(batch.experts_BTLK[..., 0, 1][known], batch.input_ids_BT[known] + 100)
            return stages.old_logprobs(batch)

        return make_loop(replace(stages.stages(), generate=generate, old_logprobs=old_logprobs), **SHAPE)

    whole, loop = list(make(stub())), make(stub())
    for batch in whole:
        known = batch.experts_BTLK[..., 0, 0] >= 0
        assert batch.experts_BTLK.shape == (*batch.input_ids_BT.shape, 1, 2)
        assert torch.equal(batch.experts_BTLK[..., 0, 0][known], batch.input_ids_BT[known])
        used = (batch.mask_BT * torch.arange(batch.mask_BT.shape[1])).amax(1) + 1  # the last target's input is read
        assert torch.equal(known.sum(1), used.long())
    first = [next(loop) for _ in range(17)]
    file = io.BytesIO()
    torch.save(loop.state_dict(), file)
    file.seek(0)
    resumed = make(stub())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(whole, first + list(resumed))


def test_rows_without_a_verdict_do_not_count(stub, make_loop):
    stages = stub(wrong={0, 1, 2, 4})
    seen = []
    loop = make_loop(
        stages.stages(old=False), rounds=1, prompts_per_round=4, group_size=3, micro_batches=2, on_round=seen.append
    )
    step = list(loop)
    assert stages.valid_B.tolist() == [False] * 3 + [True, False] + [True] * 7
    assert stages.group_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    counted = torch.cat([b.mask_BT.sum(1) > 0 for b in step])
    assert counted.sum() == 8
    for b in step:
        assert (b.sequences_total, b.prompts_total) == (8, 3)  # the first prompt has no judged row at all
        assert b.tokens_total == sum(c.mask_BT.sum() for c in step)
    assert seen[0].metrics["reward/faults"] == 4
    values = torch.stack([v for g in seen[0].groups for v in g.scores.values_BR[g.scores.valid_B]])
    assert seen[0].metrics["reward/a/mean"] == pytest.approx(values[:, 0].mean().item())
    assert [set(g.scores.messages) for g in seen[0].groups] == [
        {(0, "a"), (1, "a"), (2, "a")},
        {(1, "a")},
        set(),
        set(),
    ]


def test_groups_reach_the_listener_before_the_first_batch(stub, make_loop):
    seen = []
    loop = make_loop(stub().stages(), on_round=seen.append, **SHAPE)
    next(loop)
    assert len(seen) == 1 and seen[0].index == 0 and len(seen[0].groups) == 4
    for group in seen[0].groups:
        assert {c.prompt_id for c in group.completions} == {group.prompt.id}
        assert [c.sample_idx for c in group.completions] == [0, 1, 2]
    assert seen[0].metrics["speed/generate_tokens_per_s"] > 0


def test_the_rate_of_training_is_that_of_the_round_before(stub, make_loop, monkeypatch):
    """Stages take no time on this clock, each batch 0.5 s: the trained tokens of a round over its 12 batches' 6 s."""
    now, seen = [100.0], []
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metrics.Clock, "lap", lambda self, name: self.laps.update({name: 1e-3}))
    for _ in make_loop(stub().stages(), on_round=seen.append, **SHAPE):
        now[0] += 0.5
    tokens = [sum(len(c.token_ids) for g in r.groups for c in g.completions) for r in seen]
    rates = [r.metrics.get("speed/train_tokens_per_s") for r in seen]
    assert len(set(tokens)) == 3 and rates[0] is None
    assert rates[1:] == pytest.approx([2 * n / 6.001 for n in tokens[:2]])  # two epochs; 1 ms of old log-probs


def test_a_round_asks_for_other_seeds_than_the_last(stub, make_loop):
    seen = []
    list(make_loop(stub().stages(), on_round=seen.append, **SHAPE | {"rounds": 7}))
    seeds = [c.seed for r in seen for g in r.groups for c in g.completions]
    assert len(set(seeds)) == len(seeds) == 7 * 12
    # 28 prompts dealt from 7: every one of them 4 times.
    ids = [g.prompt.id for r in seen for g in r.groups]
    assert sorted(ids.count(i) for i in set(ids)) == [4] * 7


def test_non_finite_log_probs_are_refused(stub, make_loop):
    with pytest.raises(RolloutError, match="round 0: the engine returned non-finite"):
        next(make_loop(stub(logprob=float("nan")).stages(), **SHAPE))


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ({"rounds": 0}, ["rounds=0", "at least 1"]),
        ({"prompts_per_round": 6, "minibatches": 4}, ["prompts_per_round=6", "minibatches=4", "whole groups"]),
        ({"prompts_per_round": 2, "group_size": 3, "micro_batches": 4}, ["6 sequences", "divisor of 6"]),
    ],
)
def test_shapes_that_do_not_divide(shape, parts):
    with pytest.raises(ConfigError) as caught:
        RoundShape(**shape)
    assert all(part in str(caught.value) for part in parts)


def test_several_updates_need_old_log_probs(stub, make_loop):
    with pytest.raises(ConfigError, match=r"4 updates per round need Stages\.old_logprobs"):
        make_loop(stub().stages(old=False), **SHAPE)


def test_the_saved_state_is_not_changed_by_further_batches(stub, make_loop):
    loop = make_loop(stub().stages(), **SHAPE)
    next(loop)
    state = loop.state_dict()
    before = copy.deepcopy(state)
    list(loop)
    assert state["round"] == before["round"] and state["prompts"] == before["prompts"]
    assert len(state["buffer"]) == len(before["buffer"]) == 11
