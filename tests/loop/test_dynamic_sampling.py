"""Silent groups are replaced, truncated completions masked, greedy completions scored: on stub stages."""

from dataclasses import replace

import pytest
import torch

from lit_reason.errors import ConfigError
from lit_reason.objectives.sampling import informative
from lit_reason.types import Assessed, Completion, RewardState, Scores

SHAPE = {"rounds": 2, "prompts_per_round": 2, "group_size": 2, "micro_batches": 2}


class Scripted:
    """Rewards by the prompt: `silent` prompts get the same for both samples. Remembers what it was asked for."""

    def __init__(self, silent: set[int], cut: set[int] = frozenset(), broken_greedy: set[int] = frozenset()):
        self.silent, self.cut, self.broken = silent, cut, broken_greedy
        self.asked, self.seeds, self.assessed = [], [], []

    def generate(self, prompts, seeds, samples):
        self.asked.append([p.token_ids[0] - 1 for p in prompts[::2]])
        self.seeds += seeds
        return [
            Completion(p.id, i, (7,) * (3 + i), (-0.5,) * (3 + i), "", "length" if n in self.cut else "stop", 0, s)
            for p, s, i in zip(prompts, seeds, samples, strict=True)
            if (n := p.token_ids[0] - 1) >= 0
        ]

    def greedy(self, prompts):
        return [Completion(p.id, 0, (9,), (-0.1,), "greedy", "stop", 0, 0) for p in prompts]

    def score(self, prompts, completions):
        values_BR, states_BR = torch.zeros(len(prompts), 2), torch.zeros(len(prompts), 2, dtype=torch.long)
        for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            number = prompt.token_ids[0] - 1
            values_BR[b] = torch.tensor([float(number), 0.5 * (number not in self.silent) * completion.sample_idx])
            if completion.text == "greedy" and number in self.broken:
                values_BR[b, 0], states_BR[b, 0] = float("nan"), RewardState.ERROR
        return Scores(("a", "b"), torch.tensor([1.0, 1.0]), values_BR, states_BR)

    def assess(self, values_BR, weights_R, group_B, mask_BT, **given):
        self.assessed.append((values_BR, given))
        return Assessed(values_BR.sum(1, keepdim=True).expand(mask_BT.shape))


def make(stub, make_loop, scripted, on_round=None, greedy=False, **shape):
    stages = replace(
        stub().stages(old=False),
        generate=scripted.generate,
        score=scripted.score,
        assess=scripted.assess,
        greedy=scripted.greedy if greedy else None,
        informative=lambda *args: informative(*args, per_reward=True),
    )
    return make_loop(stages, on_round=on_round, **SHAPE | shape)


def order(make_loop, stub):
    """The prompts' numbers in the order in which the cursor deals them."""
    scripted = Scripted(set())
    list(make(stub, make_loop, scripted, rounds=3))
    return [n for asked in scripted.asked for n in asked]


def test_silent_groups_are_replaced_by_further_prompts(stub, make_loop):
    """Of the first two prompts one is silent, and so is the first that replaces it."""
    dealt = order(make_loop, stub)
    scripted, seen = Scripted(silent={dealt[1], dealt[2]}), []
    loop = make(stub, make_loop, scripted, on_round=seen.append, rounds=1, refills=3)
    step = list(loop)
    assert scripted.asked == [dealt[:2], [dealt[2]], [dealt[3]]]
    assert [g.prompt.token_ids[0] - 1 for g in seen[0].groups] == [dealt[0], dealt[3]]
    assert seen[0].metrics["rollout/refilled"] == 2
    assert seen[0].tokens == 4 * 7, "of dropped groups too: two completions of 3 and 4 tokens each"
    assert all((b.mask_BT.sum(1) > 0).all() and b.sequences_total == 4 for b in step)


def test_what_is_silent_at_the_end_is_masked_and_counts_nowhere(stub, make_loop):
    dealt = order(make_loop, stub)
    scripted, seen = Scripted(silent=set(dealt[1:4])), []
    step = list(make(stub, make_loop, scripted, on_round=seen.append, rounds=1, refills=2))
    assert scripted.asked == [dealt[:2], [dealt[2]], [dealt[3]]]
    assert [g.prompt.token_ids[0] - 1 for g in seen[0].groups] == [dealt[0], dealt[1]]
    counted = torch.cat([b.mask_BT.sum(1) > 0 for b in step])
    owner = torch.cat([b.input_ids_BT[:, 0] - 1 for b in step])
    assert set(owner[counted].tolist()) == {dealt[0]} and counted.sum() == 2
    assert all((b.sequences_total, b.prompts_total, b.tokens_total) == (2, 1, 7) for b in step)
    assert scripted.assessed[0][1]["valid_B"].tolist() == [True, True, False, False], "nor in the batch's statistics"
    # Rewards are of all four groups that were generated: prompt n earns n.
    assert seen[0].metrics["reward/a/mean"] == sum(dealt[:4]) / 4


def test_the_length_holds_and_a_resumed_run_refills_alike(stub, make_loop):
    dealt = order(make_loop, stub)
    whole = list(make(stub, make_loop, Scripted({dealt[0]}), refills=2))
    loop = make(stub, make_loop, Scripted({dealt[0]}), refills=2)
    assert len(whole) == len(loop) == 4
    first = [next(loop), next(loop)]
    again = make(stub, make_loop, Scripted({dealt[0]}), refills=2)
    again.load_state_dict(loop.state_dict())
    for a, b in zip(whole, first + list(again), strict=True):
        assert torch.equal(a.input_ids_BT, b.input_ids_BT) and torch.equal(a.advantages_BT, b.advantages_BT)


def test_a_prompt_dealt_again_by_a_refill_gets_other_seeds(stub, make_loop):
    """Seven prompts, all silent: two and then six refills of two reach the same prompt a second and a third time."""
    scripted = Scripted(silent=set(range(7)))
    list(make(stub, make_loop, scripted, rounds=1, refills=6))
    assert len(scripted.seeds) == 28 == len(set(scripted.seeds))


def test_without_refills_nothing_is_dropped(stub, make_loop):
    scripted, seen = Scripted(silent=set(range(7))), []
    list(make(stub, make_loop, scripted, on_round=seen.append, rounds=1))
    assert len(scripted.asked) == 1 and "rollout/refilled" not in seen[0].metrics


def test_truncated_completions_are_masked_and_stay_in_the_statistics(stub, make_loop):
    dealt = order(make_loop, stub)
    scripted = Scripted(set(), cut={dealt[1]})
    step = list(make(stub, make_loop, scripted, rounds=1, mask_truncated=True))
    counted = torch.cat([b.mask_BT.sum(1) > 0 for b in step])
    assert counted.sum() == 2 and all(b.sequences_total == 2 for b in step)
    assert scripted.assessed[0][1]["valid_B"].all()
    kept = list(make(stub, make_loop, Scripted(set(), cut={dealt[1]}), rounds=1))
    assert torch.cat([b.mask_BT.sum(1) > 0 for b in kept]).all()


def test_every_row_knows_the_rewards_of_its_prompts_greedy_completion(stub, make_loop):
    dealt = order(make_loop, stub)
    scripted = Scripted(set(), broken_greedy={dealt[1]})
    step = list(make(stub, make_loop, scripted, rounds=1, greedy=True))
    given = scripted.assessed[0][1]
    assert given["greedy_BR"][:2].tolist() == [[dealt[0], 0.0]] * 2 and given["greedy_BR"][2:, 0].isnan().all()
    assert given["valid_B"].tolist() == [True, True, False, False]
    assert torch.cat([b.mask_BT.sum(1) > 0 for b in step]).sum() == 2


def test_refills_need_to_know_what_is_silent(stub, make_loop):
    with pytest.raises(ConfigError, match=r"rollout.shape.refills=1: the objective does not compare"):
        make_loop(stub().stages(old=False), **SHAPE, refills=1)


def test_the_limit_of_faults_is_the_rounds(stub, make_loop):
    """Four groups were generated, in three calls; the check sees them together, once."""
    dealt, seen = order(make_loop, stub), []
    scripted = Scripted(silent={dealt[1], dealt[2]})
    loop = make(stub, make_loop, scripted, rounds=1, refills=3)
    loop.stages = replace(loop.stages, check=lambda scores: seen.append(len(scores.values_BR)))
    next(loop)
    assert seen == [8]


def test_the_limit_of_faults_counts_the_greedy_completions_too(stub, make_loop):
    """Four completions and two greedy ones, one of which the verifier could not judge."""
    dealt, seen = order(make_loop, stub), []
    loop = make(stub, make_loop, Scripted(set(), broken_greedy={dealt[1]}), rounds=1, greedy=True)
    loop.stages = replace(loop.stages, check=lambda scores: seen.append(scores.valid_B.tolist()))
    next(loop)
    assert seen == [[True] * 5 + [False]]
