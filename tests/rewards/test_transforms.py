"""Scale, clip and conditions, by hand; and that they come before anything is normalised."""

import math

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from lit_reason.config import instantiate
from lit_reason.errors import ConfigError, RewardError
from lit_reason.objectives import Objective
from lit_reason.rewards import ItemReward, RewardFault, Rubric, Transforms, conditioned
from lit_reason.types import Completion, Prompt, RewardState, Scores

OK, TIMEOUT, ERROR = RewardState.OK, RewardState.TIMEOUT, RewardState.ERROR


class Column(ItemReward):
    """Entry i for row i; the completion's text is its row."""

    def __init__(self, *entries, weight=1.0):
        super().__init__(weight)
        self.entries = entries

    def score(self, prompt, completion):
        return self.entries[int(completion.text)]


def score(columns, **settings):
    """Scores of columns of entries, through a real rubric that tolerates every fault."""
    rows = len(next(iter(columns.values())))
    prompts = [Prompt("p", "?", "5", "test")] * rows
    completions = [Completion("p", i, (1,), (0.0,), str(i), "stop", 0, 0) for i in range(rows)]
    rewards = {name: Column(*entries) for name, entries in columns.items()}
    return Rubric(rewards, max_fault_fraction=1.0, **settings).score(prompts, completions)


def column(scores, name):
    return scores.values_BR[:, scores.names.index(name)].tolist()


def test_a_reward_counts_where_another_reaches_the_threshold():
    """Equation 8: answers 1, 0.5, 0.25 against 0.5; reached is enough."""
    got = conditioned(torch.tensor([0.3, 0.4, 0.9]), torch.tensor([1.0, 0.5, 0.25]), 0.5)
    assert got.tolist() == pytest.approx([0.3, 0.4, 0.0])
    nan = math.nan
    got = conditioned(torch.tensor([nan, nan, 0.4, 0.4]), torch.tensor([1.0, 0.0, nan, 0.0]), 0.5)
    assert got.isnan().tolist() == [True, True, True, False] and got[3] == 0


def test_the_threshold_is_met_by_the_verifiers_own_number():
    """float32(0.7) is below the double 0.7; as numbers of the same kind they are equal."""
    assert float(torch.tensor(0.7)) < 0.7
    got = score(
        {"answer": [0.7, 0.6999], "length": [1.0, 1.0]}, conditions={"length": {"on": "answer", "at_least": 0.7}}
    )
    assert column(got, "length") == [1.0, 0.0]


def test_scale_then_clip_then_condition():
    """x 3, then into [-1, 2], then 0 where the answer is wrong, although 0.5 is below the scaled answer's threshold."""
    columns = {"answer": [1.0, 1.0, 1.0, 0.0], "length": [0.5, 1.0, -1.0, 1.0]}
    settings = {
        "scale": {"length": 3, "answer": 0.1},
        "clip": {"length": [-1, 2], "answer": [0, 0.05]},
        "conditions": {"length": {"on": "answer", "at_least": 1.0}},  # of the verdict, not of 0.05
    }
    got = score(columns, **settings)
    assert column(got, "length") == [1.5, 2.0, -1.0, 0.0]
    assert column(got, "answer") == pytest.approx([0.05, 0.05, 0.05, 0.0])
    assert got.valid_B.all() and got.values_BR.dtype == torch.float32
    # an unmet condition is 0 even where `clip` begins above it
    assert column(score(columns, **settings | {"clip": {"length": [1, 2]}}), "length") == [1.5, 2.0, 1.0, 0.0]


def test_a_condition_looks_at_the_verdict_not_at_what_another_condition_left():
    """c hangs on b, b on a: in row 0 b is zeroed, and c counts all the same, in whichever order they are written."""
    columns = {"a": [0.0, 1.0], "b": [1.0, 0.0], "c": [1.0, 1.0]}
    conditions = {"b": {"on": "a", "at_least": 1}, "c": {"on": "b", "at_least": 1}}
    for order in (conditions, dict(reversed(conditions.items()))):
        got = score(columns, conditions=order)
        assert column(got, "b") == [0.0, 0.0] and column(got, "c") == [1.0, 0.0]


def test_without_a_verdict_there_is_no_conditioned_reward():
    """Neither 0 nor the unconditioned value: the entry takes over the state, and is no fault of its own."""
    timeout, error = RewardFault(TIMEOUT, "slow"), RewardFault(ERROR, "broken")
    columns = {"answer": [1.0, timeout, timeout], "length": [1.0, 1.0, error]}
    settings = {"conditions": {"length": {"on": "answer", "at_least": 1.0}}, "scale": {"length": 2.0}}
    got = score(columns, **settings)
    assert got.states_BR.tolist() == [[OK, OK], [TIMEOUT, TIMEOUT], [TIMEOUT, ERROR]]
    assert got.values_BR.isnan().tolist() == [[False, False], [True, True], [True, True]]
    assert got.messages[1, "length"] == "its condition 'answer' failed: slow" and got.messages[2, "length"] == "broken"
    rubric = Rubric({"answer": Column(1.0, timeout), "length": Column(1.0, 1.0)}, max_fault_fraction=0.5, **settings)
    prompts = [Prompt("p", "?", "5", "test")] * 2
    completions = [Completion("p", i, (1,), (0.0,), str(i), "stop", 0, 0) for i in range(2)]
    rubric.score(prompts, completions)
    assert rubric.faults == {"answer": {"ERROR": 0, "TIMEOUT": 1}, "length": {"ERROR": 0, "TIMEOUT": 0}}


def test_conditions_come_before_the_normalisation():
    """Lengths 1, 0, 1, 1 of answers 1, 1, 0, 0: conditioned 1, 0, 0, 0, of mean 1/4 and sample std 1/2.

    So the column's advantages are 1.5 and three times -0.5. Zeroed after the normalisation the baseline would be 3/4.
    """
    columns = {"answer": [1.0, 1.0, 0.0, 0.0], "length": [1.0, 0.0, 1.0, 1.0]}
    got = score(columns, weights={"answer": 0.0}, conditions={"length": {"on": "answer", "at_least": 1.0}})
    gdpo = {"name": "gdpo", "eps": 0.0, "ddof": 1, "batch_norm": None, "batch_eps": 0.0}
    advantages_BT = Objective(gdpo, "token", "none", "token_mean").advantages(
        got.values_BR, got.weights_R, torch.zeros(4, dtype=torch.long), torch.ones(4, 1)
    )
    assert advantages_BT[:, 0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])


def test_without_transforms_scores_pass_as_they_are():
    scores = Scores(("a",), torch.ones(1), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    assert Transforms(["a"])(scores) is scores
    changed = Transforms(["a"], scale={"a": 2.0})(scores)
    assert changed.values_BR.tolist() == [[2.0], [2.0]] and scores.values_BR.tolist() == [[1.0], [1.0]]


def test_a_factor_that_overflows_stops_the_run_unless_the_clip_mends_it():
    with pytest.raises(RewardError, match=r"rubric\.scale\.a=1e\+30 makes a value infinite"):
        score({"a": [1e30]}, scale={"a": 1e30})
    assert column(score({"a": [1e30]}, scale={"a": 1e30}, clip={"a": [0, 1]}), "a") == [1.0]


def test_a_yaml_may_write_on_without_quotes():
    """YAML 1.1 reads it as true."""
    text = "{_target_: lit_reason.rewards.Rubric, _partial_: true, conditions: {b: {on: a, at_least: 1}}}"
    assert True in yaml.safe_load(text)["conditions"]["b"]
    rubric = instantiate(OmegaConf.create(text), rewards={"a": Column(), "b": Column()})()
    assert rubric.transforms.conditions == {"b": ("a", 1.0)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": {"lenght": 2}}, "rubric.scale.lenght: there is no reward 'lenght': did you mean 'length'"),
        ({"clip": {"lenght": [0, 1]}}, "rubric.clip.lenght: .*did you mean 'length'"),
        ({"conditions": {"lenght": {"on": "answer", "at_least": 1}}}, "rubric.conditions.lenght: .*'length'"),
        ({"conditions": {"length": {"on": "anser", "at_least": 1}}}, "conditions.length.on='anser': .*'answer'"),
        ({"conditions": {"length": {"on": "length", "at_least": 1}}}, "cannot hang on itself; valid: answer"),
        ({"conditions": {"length": {"on": "answer"}}}, "rubric.conditions.length lacks 'at_least'. Type e.g. 'rubric"),
        ({"conditions": {"length": {"at_least": 1}}}, "rubric.conditions.length lacks 'on'"),
        ({"conditions": {"length": {"on": "answer", "at_lest": 1}}}, "conditions.length.at_lest: .*'at_least'"),
        ({"conditions": {"length": {"on": "answer", "at_least": "1"}}}, "length.at_least='1'; valid: a finite number"),
        ({"conditions": {"length": {"on": "answer", "at_least": math.nan}}}, "length.at_least=nan; valid: a finite"),
        ({"conditions": {"length": "answer"}}, "conditions.length='answer'; valid: {on: NAME, at_least: NUMBER}"),
        ({"conditions": ["length"]}, "valid: a mapping from reward names. Type e.g. 'rubric.conditions={length"),
        ({"scale": {"length": math.inf}}, "rubric.scale.length=inf; valid: a finite number"),
        ({"scale": {"length": True}}, "rubric.scale.length=True; valid: a finite number"),
        ({"clip": {"length": [1, 0]}}, r"rubric.clip.length=\[1, 0\]; valid: low <= high"),
        ({"clip": {"length": [0]}}, r"rubric.clip.length=\[0\]; valid: \[low, high\]"),
        ({"clip": {"length": "01"}}, "rubric.clip.length='01'; valid: .low, high"),
        ({"clip": {"length": [0, None]}}, r"rubric.clip.length\[1\]=None; valid: a finite number"),
        ({"max_fault_fraction": 1.5}, "rubric.max_fault_fraction=1.5; valid: a number from 0 to 1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_when_it_is_built(settings, said):
    with pytest.raises(ConfigError, match=said):
        Rubric({"answer": Column(), "length": Column()}, **settings)
