"""Real tasks, real scorers, hostile answers."""

import json

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from lit_reason.rewards import AnswerExact, ReasoningGymScore, RewardFault, Rubric
from lit_reason.types import Completion, Prompt, RewardState

MALFORMED = ["zzz (1)", "12", "[1, 2]", "1 2 3", "a=b", "{}", "(1,2)", "None", "1/2", "-", "x\nz", "[[1]]", '{"a": 1}']
TASKS = ["chain_sum", "basic_arithmetic", "gcd", "lcm", "countdown", "binary_matrix", "arc_agi"]
EVALUATING = ["countdown", "binary_matrix", "spiral_matrix", "n_queens", "string_insertion", "puzzle24"]


def prompt(name, seed=1):
    entry = json.loads(json.dumps(reasoning_gym.create_dataset(name, size=1, seed=seed)[0], default=str))
    meta = {"reasoning_gym": {"dataset": name, "entry": entry}}
    return Prompt(name, entry["question"], str(entry["answer"]), f"reasoning_gym/{name}", meta=meta)


def completion(name, answer):
    text = f"<think>t</think><answer>{answer}</answer>"
    return Completion(name, 0, (1,), (0.0,), text, "stop", 0, 0)


@pytest.fixture(scope="module")
def reward():
    reward = ReasoningGymScore(timeout_s=0.5, isolation="limits")
    yield reward
    reward.close()


def scores(reward, name, *answers):
    return reward([prompt(name)] * len(answers), [completion(name, answer) for answer in answers])


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_answer_scores_one_and_another_less(reward, name):
    right, wrong = scores(reward, name, prompt(name).answer, "zzz")
    assert right == 1.0 and 0 <= wrong < 0.1


def test_countdown_accepts_another_way_to_the_target(reward):
    reference = prompt("countdown").answer
    # the second uses 0, which is not one of the numbers
    assert scores(reward, "countdown", f"({reference})", f"0*0 + ({reference})") == [1.0, 0.05]


def test_an_endless_power_is_a_timeout_and_its_neighbours_are_scored(reward):
    task = prompt("countdown")
    before, hung, after = scores(reward, "countdown", task.answer, "9**9**9**9", task.answer)
    assert (before, after) == (1.0, 1.0)
    assert isinstance(hung, RewardFault) and hung.state is RewardState.TIMEOUT


@pytest.mark.parametrize("name", EVALUATING)
def test_hostile_answers_do_nothing_and_never_pass(reward, tmp_path, name):
    tmp_path.chmod(0o777)
    answers = [
        f"__import__('os').system('touch {tmp_path}/X')",
        f"open('{tmp_path}/X', 'w')",
        "__import__('os')._exit(0)",
    ]
    for entry in scores(reward, name, *answers):
        assert isinstance(entry, RewardFault) and entry.state is RewardState.ERROR, (name, entry)
    assert list(tmp_path.iterdir()) == []


def test_no_tags_is_zero_and_no_task_is_an_error(reward):
    task = prompt("gcd")
    bare = Completion("gcd", 0, (1,), (0.0,), task.answer, "stop", 0, 0)
    foreign = Prompt("gcd", "?", "1", "jsonl/mine")
    zero, fault = reward([task, foreign], [bare, completion("gcd", "1")])
    assert zero == 0.0
    assert isinstance(fault, RewardFault) and "jsonl/mine" in fault.message


def test_an_unknown_task_is_an_error(reward):
    task = Prompt("x", "?", "1", "s", meta={"reasoning_gym": {"dataset": "chain_sun", "entry": {"metadata": {}}}})
    (fault,) = reward([task], [completion("x", "1")])
    assert isinstance(fault, RewardFault) and "chain_sun" in fault.message


def test_in_a_rubric(reward):
    task = prompt("gcd")
    rubric = Rubric({"task": reward, "answer": AnswerExact()})
    values = rubric.score([task, task], [completion("gcd", task.answer), completion("gcd", "none")]).values_BR
    assert values.tolist() == [[1, 1], [0, 0]]


def test_every_task_scores_as_in_its_own_process_and_malformed_answers_are_no_faults(reward):
    differing = {}
    for name in sorted(set(DATASETS) - {"composite"}):
        dataset = reasoning_gym.create_dataset(name, size=1, seed=3)
        entry, task = dataset[0], prompt(name, seed=3)
        reference = entry["answer"] if isinstance(entry["answer"], str) else "None"
        answers = [reference, *MALFORMED]
        local = dataset.score_answer(reference.strip(), entry)
        got = reward([task] * len(answers), [completion(name, answer) for answer in answers])
        faults = [(a, e.message) for a, e in zip(answers, got, strict=True) if isinstance(e, RewardFault)]
        if got[0] != local or faults:
            differing[name] = (local, got[0], faults)
    assert differing == {}
