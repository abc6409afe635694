"""`evaluate` on an engine that answers from a table, so that every number can be counted by hand."""

import io
import json
import math

import pytest
import torch

from lit_reason.errors import ConfigError, DataError
from lit_reason.evaluate import compare, evaluate, pass_at_k, proportion
from lit_reason.rollout import Sampling
from lit_reason.types import Completion, Prompt, RewardState, Scores

SAMPLING = Sampling(temperature=1.0, top_p=0.9, min_p=0.1, max_tokens=8)


class TableEngine:
    """Answers `greedy[id]`, or `sampled[id][sample_idx]` at a temperature above 0."""

    def __init__(self, greedy, sampled=None):
        self.greedy, self.sampled, self.seeds = greedy, sampled or {}, []

    def generate(self, prompts, sampling, seeds, sample_idx=None, progress=None):
        assert len(prompts) == len(seeds) == len(sample_idx)
        assert sampling.temperature > 0 or (sampling.top_p, sampling.min_p) == (1.0, 0.0)
        self.seeds += seeds
        out = []
        for prompt, i, seed in zip(prompts, sample_idx, seeds, strict=True):
            text = self.sampled[prompt.id][i] if sampling.temperature else self.greedy[prompt.id]
            reason = "stop" if text.endswith(">") else "length"
            out.append(Completion(prompt.id, i, tuple(range(len(text))), (0.0,) * len(text), text, reason, 3, seed))
        return out


class Judge:
    """Columns answer (in tags), answer_anywhere, length = -len/10; a completion "crash" breaks the answer verifier."""

    def score(self, prompts, completions):
        rows, states, messages = [], [], {}
        for row, (p, c) in enumerate(zip(prompts, completions, strict=True)):
            crash = "crash" in c.text
            right = 0.999 if c.text == "nearly" else float(f"<answer>{p.answer}</answer>" in c.text)
            rows.append([math.nan if crash else right, float(p.answer in c.text), -len(c.text) / 10])
            states.append([RewardState.ERROR if crash else RewardState.OK, RewardState.OK, RewardState.OK])
            if crash:
                messages[row, "answer"] = "boom"
        weights = torch.tensor([1.0, 0.0, 0.5])
        names = ("answer", "answer_anywhere", "length")
        return Scores(names, weights, torch.tensor(rows), torch.tensor(states), messages)


PROMPTS = [Prompt(id=q, question=f"Q{q}", answer=a, source="t") for q, a in [("a", "1"), ("b", "2"), ("c", "3")]]


def tag(x):
    return f"<answer>{x}</answer>"


def run(greedy, sampled=None, k=0, prompts=PROMPTS):
    return evaluate(TableEngine(greedy, sampled), prompts, Judge(), sampling=SAMPLING, k=k, seed=5)


def test_greedy_numbers_by_hand():
    report = run({"a": tag(1), "b": "2 is it", "c": tag(9)})
    assert report.pass_at_1 == proportion([1, 0, 0])
    assert report.pass_at_1_format_blind == proportion([1, 1, 0])
    assert [i.correct for i in report.items] == [True, False, False]
    assert report.items[0].columns == {"answer": 1.0, "answer_anywhere": 1.0, "length": pytest.approx(-1.8)}
    assert report.rewards["total"].value == pytest.approx((1 - 0.9 - 0.35 - 0.9) / 3)
    s = report.summary()
    assert s["pass_at_1"] == pytest.approx(1 / 3) and s["n"] == 3 and s["faults"] == 0
    assert s["completion/truncated"] == pytest.approx(1 / 3)
    assert s["tokens"] == 18 + 7 + 18
    assert all(type(v) is float for v in s.values())


def test_correct_is_exactly_one():
    assert run({"a": "nearly", "b": tag(2), "c": tag(3)}).pass_at_1.value == pytest.approx(2 / 3)


def test_faults_leave_the_denominator():
    report = run({"a": tag(1), "b": tag(9), "c": "crash"})
    assert report.pass_at_1 == proportion([1, 0])
    assert report.faults == 1 and report.items[2].correct is None
    assert report.items[2].faults == {"answer": "boom"}
    # its other columns still count, its weighted sum does not
    assert report.rewards["length"].n == 3 and report.rewards["total"].n == 2


def test_samples_by_hand():
    sampled = {
        "a": [tag(1), tag("1.0x"), tag(1), tag(7)],  # 2 of 4 right, 1 outvotes
        "b": [tag(5), tag(5), tag(2), "none"],  # 1 of 4 right, 5 outvotes
        "c": [tag(3), "crash", tag(3), tag(4)],  # 2 of 3 judged right
    }
    report = run({"a": "", "b": "", "c": ""}, sampled, k=4)
    assert report.avg_at_k == proportion([2 / 4, 1 / 4, 2 / 3])
    assert report.maj_at_k == proportion([1, 0, 1])
    assert set(report.pass_at_k) == {2, 4}
    assert report.pass_at_k[2] == proportion([pass_at_k(4, 2, 2), pass_at_k(4, 1, 2), pass_at_k(3, 2, 2)])
    assert report.pass_at_k[4] == proportion([1, 1])  # c has only 3 judged samples
    assert report.summary()["pass_at_2"] == report.pass_at_k[2].value


def test_a_repeated_question_counts_once():
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[1]]
    report = run({"a": tag(1), "b": "no"}, prompts=prompts)
    assert report.pass_at_1 == proportion([1, 0]) and len(report.items) == 4


def test_seeds_differ_between_samples_and_repeat_between_runs():
    first, second = (
        TableEngine({}, {p.id: ["x"] * 3 for p in PROMPTS}),
        TableEngine({}, {p.id: ["x"] * 3 for p in PROMPTS}),
    )
    for engine in (first, second):
        engine.greedy = {p.id: "x" for p in PROMPTS}
        evaluate(engine, PROMPTS, Judge(), sampling=SAMPLING, k=3, seed=5)
    assert first.seeds == second.seeds and len(set(first.seeds[3:])) == 9


def test_jsonl_has_every_completion(tmp_path):
    report = run({"a": tag(1), "b": "crash", "c": ""}, {p.id: [tag(1)] for p in PROMPTS}, k=1)
    path = tmp_path / "deep" / "items.jsonl"
    report.write_jsonl(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["mode"] for r in rows] == ["greedy"] * 3 + ["sample"] * 3
    assert rows[0]["given"] == "1" and rows[0]["question"] == "Qa" and rows[0]["version"] == 3
    assert rows[1]["columns"]["answer"] is None and rows[1]["correct"] is None
    assert [p.name for p in path.parent.iterdir()] == ["items.jsonl"]


def test_bad_input_says_what_to_type():
    with pytest.raises(DataError, match="0 prompts"):
        evaluate(TableEngine({}), [], Judge(), sampling=SAMPLING)
    with pytest.raises(ConfigError, match="k=-1"):
        evaluate(TableEngine({}), PROMPTS, Judge(), sampling=SAMPLING, k=-1)
    with pytest.raises(ConfigError, match="did you mean 'answer'"):
        evaluate(TableEngine({p.id: "" for p in PROMPTS}), PROMPTS, Judge(), sampling=SAMPLING, correct="anser")


def many(right):
    prompts = [Prompt(id=str(i), question="", answer="1", source="t") for i in range(100)]
    return run({str(i): tag(1) if i in right else "1" for i in range(100)}, prompts=prompts)


def test_compare_shows_a_gain_and_its_control():
    before, after = many(range(40)), many(range(70))
    comparison = compare(before, after)
    d = comparison.to_dict()
    assert (d["n"], d["pass_at_1_before"], d["pass_at_1_after"], d["difference"]) == (100, 0.4, 0.7, pytest.approx(0.3))
    assert d["ci_before"] == list(before.pass_at_1.ci) and d["verdict"] == "better" and d["intervals_disjoint"]
    # by format alone: every answer was there before
    assert d["pass_at_1_format_blind_before"] == d["pass_at_1_format_blind_after"] == 1.0
    assert d["verdict_format_blind"] == "no difference shown"
    assert d["reward_after"] == pytest.approx(after.rewards["total"].value)
    json.dumps(d)
    assert compare(after, before).verdict == "worse"


def test_compare_says_nothing_better_when_the_interval_holds_zero():
    d = compare(many(range(40)), many(range(41))).to_dict()
    assert d["ci_difference"][0] <= 0 <= d["ci_difference"][1] and d["verdict"] == "no difference shown"


def test_compare_drops_a_faulty_question_from_both_sides():
    before = run({"a": "crash", "b": tag(2), "c": tag(9)})
    after = run({"a": tag(1), "b": tag(2), "c": tag(3)})
    comparison = compare(before, after)
    assert comparison.faulty == 1
    assert comparison.pass_at_1.before == proportion([1, 0]) and comparison.pass_at_1.after == proportion([1, 1])


def test_compare_of_nothing_but_faults_says_why():
    with pytest.raises(DataError, match=r"the reward 'answer' failed on each of the 3 questions.*boom"):
        compare(run(dict.fromkeys("abc", "crash")), run({"a": tag(1), "b": tag(2), "c": tag(3)}))


def test_a_mean_of_nothing_is_null_in_the_summary():
    # a and b fail before, c after: nothing is whole on both sides but c's answer before and a's and b's after
    before, after = run({"a": "crash", "b": "crash", "c": tag(3)}), run({"a": tag(1), "b": tag(2), "c": tag(3)})
    before.items[2].faults["length"] = "none"
    d = compare(before, after).to_dict()
    assert d["reward_before"] is None and d["pass_at_1_before"] == 1.0
    json.dumps(d, allow_nan=False)


def test_compare_refuses_other_questions():
    with pytest.raises(DataError, match="1 questions are only before"):
        compare(run({"a": "", "b": "", "c": ""}), run({"a": "", "b": ""}, prompts=PROMPTS[:2]))


def test_compare_table_shows_both_intervals():
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compare(many(range(40)), many(range(70))).table())
    text = console.export_text()
    assert "100 held-out questions: better" in text and "+30.0 points" in text and "40.0% [30.9, 49.8]" in text
