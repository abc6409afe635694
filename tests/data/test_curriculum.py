"""Easy prompts first: pools and ranks by hand, walks without repetition, and resume at every position."""

import json
import math
from collections import Counter

import pytest

from lit_reason.data import Curriculum, PromptCursor, PromptData, ReasoningGym
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt

# Prompt i has 10 - i tokens: 9 is the easiest.
PROMPTS = [Prompt(f"{i:016x}", str(i), "", "test", (1,) * (10 - i)) for i in range(10)]


def ids(prompts):
    return [int(p.question) for p in prompts]


def with_meta(*values):
    return [Prompt(f"{i:016x}", str(i), "", "test", (1,), {"fields": {"level": v}}) for i, v in enumerate(values)]


def cursor(prompts=PROMPTS, seed=5, per_round=2, **settings):
    return PromptCursor(prompts, seed, curriculum=Curriculum(**settings), prompts_per_round=per_round)


def test_the_pool_grows_in_a_straight_line():
    """f = 0.25 + 0.75 r / 4 of 10: 2.5, 4.375, 6.25, 8.125, then 10 for good; a part of a prompt is a prompt."""
    curriculum = Curriculum(start=0.25, rounds=4)
    assert [curriculum.pool(10, r) for r in range(6)] == [3, 5, 7, 9, 10, 10]
    assert Curriculum(start=0.001).pool(10, 0) == 1 and Curriculum(start=1.0).pool(10, 0) == 10
    for start in (0.1, 0.3, 0.7, 0.9):  # 1 - start is no float64 here
        assert Curriculum(start=start, rounds=7).pool(10**6, 7) == 10**6


def test_ranks_are_of_tokens_or_of_a_number_of_the_meta_and_ties_keep_their_order():
    assert Curriculum().ranks(PROMPTS).tolist() == list(range(9, -1, -1))
    assert Curriculum(key="fields.level").ranks(with_meta(2, 0.5, 2, -1)).tolist() == [2, 1, 3, 0]


def test_a_round_deals_only_what_its_pool_holds():
    """Pools of 3, 5, 7, 9 and 10 prompts in rounds of 2; the easiest m are those with the largest number."""
    dealt = ids(cursor(rounds=4).next(40))
    for r, m in enumerate([3, 5, 7, 9] + [10] * 16):
        assert all(i >= 10 - m for i in dealt[2 * r : 2 * r + 2]), (r, dealt)
    assert set(dealt[8:]) == set(range(10))


def test_a_round_counts_prompts_not_calls():
    """Dynamic sampling asks again within a round."""
    whole, parts = cursor(rounds=4), cursor(rounds=4)
    wanted = ids(whole.next(30))
    assert [i for n in (1, 4, 2, 9, 1, 13) for i in ids(parts.next(n))] == wanted
    assert parts.state_dict() == whole.state_dict()


def test_no_prompt_comes_twice_in_an_epoch_and_a_constant_pool_is_dealt_completely():
    slow = cursor(rounds=10**6, start=0.5)  # pool 5 in the first rounds, then 6 for the rest of this test
    dealt = [(slow.epoch, i) for _ in range(30) for i in ids(slow.next(1))]
    assert max(Counter(dealt).values()) == 1
    by_epoch = [sorted(i for e, i in dealt if e == epoch) for epoch in range(1, 4)]
    assert by_epoch == [[4, 5, 6, 7, 8, 9]] * 3
    growing = cursor(rounds=8)
    assert max(Counter((growing.epoch, i) for _ in range(60) for i in ids(growing.next(1))).values()) == 1


def test_each_allowed_prompt_is_as_likely_as_another():
    """The third prompt, the first of round 1 and its pool of 5, over 3000 seeds: 600 each, deviation sqrt(480) = 22.

    The walk stands behind the second of the three easy ones. Of the 20 ways to lay the two new ones among them 12 put
    neither between the second and the third: the third easy one is next with 12/20, so each of the five with 1/5. New
    ones that came first, whenever the pool grows, would be harder than their share.
    """
    third = Counter(ids(cursor(seed=seed, rounds=4).next(3))[2] for seed in range(3000))
    assert set(third) == {5, 6, 7, 8, 9} and all(abs(n - 600) < 5 * math.sqrt(480) for n in third.values())


@pytest.mark.parametrize("position", range(45))
def test_resume_at_every_position_deals_what_would_have_come(position):
    whole = cursor(rounds=6)
    whole.next(position)
    state = json.loads(json.dumps(whole.state_dict()))
    assert set(state) == {"epoch", "index", "seed", "size", "dealt"} and all(type(v) is int for v in state.values())
    resumed = cursor(seed=99, rounds=6)
    resumed.load_state_dict(state)
    assert ids(resumed.next(25)) == ids(whole.next(25))
    assert resumed.state_dict() == whole.state_dict()


def test_with_all_prompts_from_the_start_it_deals_as_without():
    assert ids(cursor(start=1.0).next(35)) == ids(PromptCursor(PROMPTS, seed=5).next(35))


def test_a_position_fits_only_a_cursor_of_its_kind():
    plain, graded = PromptCursor(PROMPTS), cursor()
    with pytest.raises(DataError, match="reached without a curriculum, and this run is with one"):
        graded.load_state_dict(plain.state_dict())
    with pytest.raises(DataError, match="reached with a curriculum, and this run is without one"):
        plain.load_state_dict(graded.state_dict())


@pytest.mark.parametrize(
    ("prompts", "key", "said"),
    [
        (with_meta(1, 2), "fields.levle", "0{16} of test has no such entry in its meta: did you mean 'fields.level'"),
        (with_meta(1, 2), "level", r"no such entry in its meta: .*valid: fields\. Type data\.curriculum\.key=NAME"),
        (with_meta(1, 2), "fields.level.x", "no such entry"),
        (with_meta(1, "hard"), "fields.level", "0{15}1 of test has 'hard' there; valid: a finite number"),
        (with_meta(1, math.nan), "fields.level", "has nan there"),
        (with_meta(True), "fields.level", "has True there"),
        (with_meta(1), "fields", "has .*'level': 1.* there; valid: a finite number"),
    ],
)
def test_a_difficulty_that_is_no_number_is_refused(prompts, key, said):
    with pytest.raises(DataError, match=said):
        cursor(prompts, key=key)


def test_refusals():
    for start in (0, -0.1, 1.5):
        with pytest.raises(ConfigError, match=rf"data\.curriculum\.start={start}; valid: above 0, at most 1"):
            Curriculum(start=start)
    with pytest.raises(ConfigError, match=r"data\.curriculum\.rounds=0; valid: 1 or more"):
        Curriculum(rounds=0)
    for per_round in (None, 0):
        with pytest.raises(ConfigError, match=f"prompts_per_round={per_round}; valid: 1 or more"):
            PromptCursor(PROMPTS, curriculum=Curriculum(), prompts_per_round=per_round)
    with pytest.raises(ConfigError, match=r"data\.curriculum=\{'rounds': 3\}; valid: a node with a _target_"):
        PromptData(PROMPTS, curriculum={"rounds": 3})


def test_the_sums_of_the_demo_have_a_difficulty():
    """By default longer sums are harder; by key the number of terms is."""
    data = PromptData(ReasoningGym({"chain_sum": {"min_terms": 2, "max_terms": 3}}, size=60), curriculum=Curriculum())
    prompts = data.train_prompts()
    terms = [p.meta["reasoning_gym"]["entry"]["metadata"]["num_terms"] for p in prompts]
    ranks = Curriculum(key="reasoning_gym.entry.metadata.num_terms").ranks(prompts)
    assert sorted(terms) == [terms[i] for i in ranks.argsort()] and set(terms) == {2, 3}
    by_tokens = [len(prompts[i].token_ids) for i in data.curriculum.ranks(prompts).argsort()]
    assert by_tokens == sorted(by_tokens) and by_tokens[0] < by_tokens[-1]
