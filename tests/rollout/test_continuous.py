"""Rows enter as others leave, and nobody notices but the clock."""

from dataclasses import replace

import pytest
import torch

from lit_reason.errors import RolloutError
from lit_reason.rollout import BuiltinEngine, Sampling
from lit_reason.rollout.continuous import _admitted, generate_rows


@pytest.fixture
def endless(tokenizer):
    """A tokenizer whose stop token never comes."""
    tokenizer.stop_ids = (272,)
    return tokenizer


def spread_limits(n: int) -> list[int]:
    return [3 + 7 * i % 29 for i in range(n)]


def test_the_batch_stays_full_until_nobody_waits(model, prompts):
    """At least 1/8 of the 16 rows must be free before others enter, so 15 are always busy while some wait."""
    limits, drawn, waits = spread_limits(80), [], []

    def report(tokens: int, finished: int) -> None:
        drawn.append(tokens)
        waits.append(sum(drawn[:-1]) < sum(limits) - 16 * 31)  # more is left than 16 rows can hold

    ids = [prompt.token_ids for prompt in prompts(80)]
    with torch.inference_mode():
        rows = generate_rows(model.eval(), ids, limits, range(80), Sampling(), torch.tensor([272]), 16, report)
    assert [len(row.ids) for row in rows] == limits and sum(drawn) == sum(limits)
    busy = [n for n, wait in zip(drawn, waits, strict=True) if wait]
    assert len(busy) > 30 and min(busy) >= 15 and max(busy) == 16


def test_limits_cut_what_longer_ones_would_give(endless, model, prompts):
    engine = BuiltinEngine(endless, dtype="float32", max_rows=16)
    engine.push(model, 0)
    asked, limits = prompts(60), spread_limits(60)
    full = engine.generate(asked, Sampling(max_tokens=31), range(60))
    cut = engine.generate(asked, Sampling(max_tokens=31), range(60), limits=limits)
    for long, short, limit in zip(full, cut, limits, strict=True):
        assert (len(long.token_ids), short.finish_reason) == (31, "length")
        assert short.token_ids == long.token_ids[:limit]
        assert short.logprobs == pytest.approx(long.logprobs[:limit], abs=1e-5)
    both = engine.generate(asked[:2], Sampling(max_tokens=5), [0, 1], limits=[4, 9])
    assert [len(c.token_ids) for c in both] == [4, 5], "the stricter of the two limits holds"


@pytest.mark.parametrize("max_rows", [1, 24, 48])
def test_a_request_gets_the_same_in_float32_whatever_runs_beside_it(tokenizer, model, prompts, max_rows):
    """96 rows that end by themselves or at their limits, in batches in which cohorts come, shrink, join and go."""
    engine = BuiltinEngine(tokenizer, dtype="float32", max_rows=max_rows)
    engine.push(model, 0)
    asked = [prompt for prompt in prompts(12) for _ in range(8)]
    limits = [1 + 11 * i % 41 for i in range(96)]
    found = engine.generate(asked, Sampling(), range(96), limits=limits)
    engine.max_rows = 512
    together = engine.generate(asked, Sampling(), range(96), limits=limits)
    assert [c.token_ids for c in found] == [c.token_ids for c in together]
    assert len({len(c.token_ids) for c in found}) > 10
    assert {c.finish_reason for c in found} == {"stop", "length"}


def test_a_prompt_is_read_once_for_its_samples(endless, model, prompts, monkeypatch):
    """8 prompts x 6 samples, 20 rows at a time: three groups fit, and groups are not torn."""
    engine = BuiltinEngine(endless, dtype="float32", max_rows=20)
    engine.push(model, 0)
    read, prefill = [], type(model).prefill
    monkeypatch.setattr(
        type(model), "prefill", lambda self, ids, *rest: read.append(len(ids)) or prefill(self, ids, *rest)
    )
    asked = [
        replace(prompt, id=f"{i:016x}", token_ids=(*prompt.token_ids, i))
        for i, prompt in enumerate(prompts(8))
        for _ in range(6)
    ]
    engine.generate(asked, Sampling(max_tokens=9), range(48))
    assert read == [3, 3, 2]


def test_who_enters():
    a, b = (1,), (2,)
    assert _admitted([a, a, b, b], 0, 4) == 4
    assert _admitted([a, a, b, b], 0, 9) == 4
    assert _admitted([a, a, b, b], 0, 3) == 2, "the second group waits to enter whole"
    assert _admitted([a, a, b, b], 2, 1) == 1, "a group that is larger than the room enters in parts"
    assert _admitted([a, a, a, b], 1, 2) == 2


def test_limits_that_cannot_be_are_refused(engine, prompts):
    for limits in ([3], [3, 0]):
        with pytest.raises(RolloutError, match="one limit per completion is needed, of at least 1 token"):
            engine.generate(prompts(2), Sampling(), [0, 1], limits=limits)
