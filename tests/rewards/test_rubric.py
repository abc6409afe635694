import logging
import math
import sys
import time
import types

import pytest
import torch

from lit_reason.errors import ConfigError, RewardError
from lit_reason.rewards import AnswerExact, FormatExact, ItemReward, RewardFault, Rubric
from lit_reason.types import Completion, Prompt, RewardState

GOOD, BAD = "<think>t</think><answer>5</answer>", "<answer>6</answer>"


def pairs(*texts):
    prompts = [Prompt(f"p{i}", "?", "5", "test") for i in range(len(texts))]
    completions = [Completion(f"p{i}", 0, (1,), (0.0,), text, "stop", 0, 0) for i, text in enumerate(texts)]
    return prompts, completions


class Fixed:
    """Returns what it was given, or raises it."""

    def __init__(self, entries, weight=1.0):
        self.entries, self.weight = entries, weight

    def __call__(self, prompts, completions):
        if isinstance(self.entries, BaseException):
            raise self.entries
        return self.entries


def test_one_column_per_reward():
    rubric = Rubric({"answer": AnswerExact(), "format": FormatExact(weight=0.25)})
    scores = rubric.score(*pairs(GOOD, BAD, "<answer>5</answer>"))
    assert scores.names == ("answer", "format")
    assert scores.values_BR.tolist() == [[1, 1], [0, 0], [1, 0]] and scores.values_BR.dtype == torch.float32
    assert scores.weights_R.tolist() == [1.0, 0.25]
    assert scores.total_B.tolist() == [1.25, 0.0, 1.0]
    assert scores.valid_B.all() and scores.states_BR.dtype == torch.int64 and not scores.messages


def test_weights_override_by_name_and_unknown_names_are_refused():
    rubric = Rubric({"answer": AnswerExact(), "format": FormatExact(weight=0.25)}, weights={"format": 3})
    assert rubric.score(*pairs(GOOD)).weights_R.tolist() == [1.0, 3.0]
    with pytest.raises(ConfigError, match=r"did you mean 'answer'\?"):
        Rubric({"answer": AnswerExact()}, weights={"anwser": 1.0})
    with pytest.raises(ConfigError, match="at least one"):
        Rubric({})
    with pytest.raises(ConfigError, match="finite"):
        Rubric({"answer": AnswerExact(weight=math.inf)})


def test_a_fault_is_a_state_and_nan_never_zero():
    timeout = RewardFault(RewardState.TIMEOUT, "slow")
    rubric = Rubric({"a": Fixed([1.0, timeout, 0.0]), "b": Fixed([True, 2, 0.5])}, max_fault_fraction=0.5)
    scores = rubric.score(*pairs(GOOD, GOOD, GOOD))
    assert scores.states_BR.tolist() == [[0, 0], [RewardState.TIMEOUT, 0], [0, 0]]
    assert scores.values_BR.isnan().tolist() == [[False, False], [True, False], [False, False]]
    assert scores.values_BR[:, 1].tolist() == [1.0, 2.0, 0.5]
    assert scores.valid_B.tolist() == [True, False, True]
    assert scores.messages == {(1, "a"): "slow"}


def test_faults_are_counted_across_calls():
    timeout, error = RewardFault(RewardState.TIMEOUT, "slow"), RewardFault(RewardState.ERROR, "broken")
    rubric = Rubric({"a": Fixed([1.0, timeout]), "b": Fixed([error, error])}, max_fault_fraction=1.0)
    rubric.score(*pairs(GOOD, GOOD))
    rubric.score(*pairs(GOOD, GOOD))
    assert rubric.scored == 4
    assert rubric.faults == {"a": {"ERROR": 0, "TIMEOUT": 2}, "b": {"ERROR": 4, "TIMEOUT": 0}}


def test_a_reward_that_raises_stops_the_run_by_name():
    rubric = Rubric({"good": AnswerExact(), "bad": Fixed(KeyError("boom"))})
    with pytest.raises(RewardError, match=r"'bad' failed on 2 of 2 .*KeyError: 'boom'"):
        rubric.score(*pairs(GOOD, GOOD))
    lenient = Rubric({"good": AnswerExact(), "bad": Fixed(KeyError("boom"))}, max_fault_fraction=1.0)
    scores = lenient.score(*pairs(GOOD, GOOD))
    assert scores.states_BR[:, 1].tolist() == [RewardState.ERROR] * 2 and scores.values_BR[:, 1].isnan().all()
    assert scores.values_BR[:, 0].tolist() == [1, 1]


def test_an_item_that_raises_costs_only_its_row():
    class Picky(ItemReward):
        def score(self, prompt, completion):
            return {"a": 1.0}[completion.text]

    entries = Picky()(*pairs("a", "b", "a"))
    assert entries[0] == entries[2] == 1.0
    assert entries[1] == RewardFault(RewardState.ERROR, "KeyError: 'b'")


def test_the_allowed_fraction_is_exact():
    entries = [RewardFault(RewardState.ERROR, "x")] + [1.0] * 99
    Rubric({"a": Fixed(entries)}).score(*pairs(*[GOOD] * 100))  # 1 of 100 is allowed
    with pytest.raises(RewardError, match=r"2 of 100 .*1\.0%"):
        Rubric({"a": Fixed(entries[:1] * 2 + entries[2:])}).score(*pairs(*[GOOD] * 100))


@pytest.mark.parametrize(
    "entry",
    [math.nan, math.inf, 1e39, 10**400, None, "1", [1.0], RewardFault(RewardState.OK, "?"), RewardFault("ERROR", "?")],
    ids=lambda entry: f"{entry!r:.20}",
)
def test_what_is_no_finite_number_is_an_error(entry):
    scores = Rubric({"a": Fixed([entry])}, max_fault_fraction=1.0).score(*pairs(GOOD))
    assert scores.states_BR.item() == RewardState.ERROR and scores.values_BR.isnan().all()


def test_wrong_number_of_entries_and_mixed_up_rows():
    scores = Rubric({"a": Fixed([1.0])}, max_fault_fraction=1.0).score(*pairs(GOOD, GOOD))
    assert scores.states_BR.tolist() == [[RewardState.ERROR]] * 2 and "1 entries for 2" in scores.messages[0, "a"]
    prompts, completions = pairs(GOOD, GOOD)
    with pytest.raises(RewardError, match="belongs to prompt p1"):
        Rubric({"a": AnswerExact()}).score(prompts, completions[::-1])
    with pytest.raises(RewardError, match="2 prompts and 1 completions"):
        Rubric({"a": AnswerExact()}).score(prompts, completions[:1])


def test_an_empty_round_has_the_columns():
    scores = Rubric({"a": AnswerExact(), "b": FormatExact()}).score([], [])
    assert scores.values_BR.shape == (0, 2)


def test_a_reward_that_exits_does_not_end_the_run():
    """sys.exit(0) in a verifier once ended a training as if it were finished."""

    class Exits(ItemReward):
        def score(self, prompt, completion):
            sys.exit(0)

    for reward in (Exits(), Fixed(SystemExit(0))):
        with pytest.raises(RewardError, match=r"'bad' failed on 1 of 1 .*SystemExit: 0"):
            Rubric({"bad": reward}).score(*pairs(GOOD))


@pytest.mark.parametrize("weight", ["1.0", None])
def test_what_is_no_reward_is_refused_before_the_first_completion(weight):
    reward = Fixed([1.0])
    reward.weight = weight
    for bad in (reward, types.SimpleNamespace(weight=1.0)):
        with pytest.raises(ConfigError, match=r"the reward 'mine' is a \w+, which is no reward; valid: .*__call__"):
            Rubric({"mine": bad})


def test_a_reward_that_hangs_is_named(caplog):

    class Hangs(ItemReward):
        def score(self, prompt, completion):
            time.sleep(0.2)
            return 1.0

    with caplog.at_level(logging.WARNING):
        Rubric({"fast": AnswerExact(), "slow": Hangs()}, slow_s=0.05).score(*pairs(GOOD))
    assert "reward 'slow' has been judging 1 completions for 0.05 s" in caplog.text and "'fast'" not in caplog.text
