"""Sources give distinct questions, damaged files name their line, unknown names get the nearest ones."""

import json
import logging
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from reasoning_gym import create_dataset

from lit_reason.data import GSM8K, JSONL, ReasoningGym, prompt_id
from lit_reason.errors import ConfigError, DataError

GSM_FILES = Path(__file__).parent / "files" / "gsm8k"


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_reasoning_gym_mixes_tasks_in_equal_shares():
    prompts = list(ReasoningGym({"chain_sum": {"max_terms": 3}, "gcd": None, "leg_counting": {}}, size=50, seed=1))
    counts = {source: sum(p.source == source for p in prompts) for source in {p.source for p in prompts}}
    assert counts == {
        "reasoning_gym/chain_sum": 17,
        "reasoning_gym/gcd": 17,
        "reasoning_gym/leg_counting": 16,
    }
    assert len({p.id for p in prompts}) == 50 and all(p.id == prompt_id(p.question) for p in prompts)


def test_entry_in_meta_is_what_the_task_scores():
    for prompt in ReasoningGym({"gcd": {}, "word_sorting": {}, "countdown": {}}, size=6, seed=2):
        record = json.loads(json.dumps(dict(prompt.meta)))["reasoning_gym"]
        task = create_dataset(record["dataset"], size=1, seed=0)
        assert task.score_answer(prompt.answer, record["entry"]) == 1.0


def test_same_seed_same_prompts_and_near_seeds_are_unrelated():
    def questions(seed):
        return [p.question for p in ReasoningGym({"chain_sum": {"min_digits": 4}}, size=200, seed=seed)]

    assert questions(1) == questions(1)
    # the library's own seeds 1 and 2 would share 199 of 200
    assert len(set(questions(1)) & set(questions(2))) < 10


def test_few_distinct_questions_give_what_exists_with_a_warning(caplog):
    source = ReasoningGym({"chain_sum": {"max_terms": 2, "max_digits": 1}}, size=1000)
    with caplog.at_level(logging.WARNING):
        prompts = list(source)
    # two operands of 10 digits each, two signs
    assert len(prompts) == len({p.question for p in prompts}) == 10 * 10 * 2
    assert "200 distinct questions" in caplog.text and "1000 wanted" in caplog.text


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"chain_sums": {}}, "no task 'chain_sums'; did you mean 'chain_sum'"),
        ({"chain_sum": {"max_term": 3}}, "no config key 'max_term'; did you mean 'max_terms'"),
        ({"chain_sum": {"seed": 3}}, "no config key 'seed'"),
        ({"chain_sum": {"max_terms": 1}}, "max_terms must be >= min_terms"),
        ({"chain_sum": {"max_terms": "many"}}, "refuses the config"),
        ({"basic_arithmetic": {"allow_parentheses": False}}, "without precedence"),
        ({}, "no tasks"),
    ],
)
def test_wrong_tasks_are_refused_at_construction(tasks, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        ReasoningGym(tasks)


def test_the_refused_configuration_really_is_wrong_upstream():
    """When reasoning-gym mends its left-to-right evaluation this fails, and the refusal can go."""
    config = {"allow_parentheses": False, "operators": ["+", "*"], "min_terms": 3, "max_terms": 3}
    entries = create_dataset("basic_arithmetic", size=50, seed=0, **config)
    mixed = [e for e in entries if " + " in e["metadata"]["expression"] and " * " in e["metadata"]["expression"]]

    def value(expression):
        total = 0
        for term in expression.split(" + "):
            product = 1
            for factor in term.split(" * "):
                product *= int(factor)
            total += product
        return str(total)

    assert any(value(e["metadata"]["expression"]) != e["answer"] for e in mixed)
    assert list(ReasoningGym({"basic_arithmetic": {"allow_parentheses": False, "operators": ["+", "-"]}}, size=5))


def test_a_puzzle_without_a_reference_has_no_answer_and_its_own_scorer():
    """Several tasks answer None; the text "None" would be a reference that no right solution equals."""
    source = ReasoningGym({"propositional_logic": {}, "rush_hour": {}, "chain_sum": {}}, size=6, seed=3)
    answers = {}
    for prompt in source:
        answers.setdefault(prompt.source.removeprefix("reasoning_gym/"), []).append(prompt.answer)
    assert answers["propositional_logic"] == answers["rush_hour"] == ["", ""]
    assert all(int(answer) is not None for answer in answers["chain_sum"])


def test_gsm8k_in_its_own_format():
    prompts = list(GSM8K(str(GSM_FILES)))
    assert len(prompts) == 20 and [p.answer for p in prompts[:4]] == ["72", "10", "5", "42"]
    assert prompts[0].meta["thought"] == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
    )
    assert [p.answer for p in GSM8K(str(GSM_FILES), part="test")] == ["18", "3", "70000", "540", "20"]
    assert len(list(GSM8K(str(GSM_FILES / "test.jsonl")))) == 5


def test_gsm8k_from_the_hub_without_a_network(tmp_path, monkeypatch):
    """The hub's own cache layout on disk: what a machine has that once downloaded the dataset."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"(?s)could not get main/test-00000.*data\.source\.path="):
        list(GSM8K(part="test"))
    commit, folder = "0" * 40, tmp_path / "datasets--openai--gsm8k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / "main").mkdir(parents=True)
    rows = [json.loads(line) for line in (GSM_FILES / "test.jsonl").read_text().splitlines()]
    file = folder / "snapshots" / commit / "main" / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert list(GSM8K(part="test")) == list(GSM8K(str(GSM_FILES), part="test"))


def test_gsm8k_removes_commas_and_wants_its_last_line(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "so\n#### 1,234,567"})
    assert next(iter(GSM8K(path))).answer == "1234567"
    path = write_lines(tmp_path / "b.jsonl", {"question": "q", "answer": "so 5"})
    with pytest.raises(DataError, match=r"b\.jsonl:1: the answer has no last line '#### <number>'.*data=jsonl"):
        list(GSM8K(path))
    path = write_lines(
        tmp_path / "c.jsonl", {"question": "q", "answer": "so 5\n#### 5"}, {"question": "r", "answer": "#### "}
    )
    with pytest.raises(DataError, match=r"c\.jsonl:2: the answer has no last line '#### <number>'"):
        list(GSM8K(path))
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        GSM8K(path, part="tests")
    with pytest.raises(DataError, match="no file"):
        list(GSM8K(str(tmp_path / "missing.jsonl")))


def test_jsonl_fields_thought_and_repeats(tmp_path, caplog):
    path = write_lines(
        tmp_path / "mine.jsonl",
        {"q": "What is  2+3?", "a": 5, "work": "2+3=5", "level": 1},
        "",
        {"q": "WHAT IS 2+3?", "a": 5},
        {"q": "What is 4+4?", "a": 8.5},
    )
    with caplog.at_level(logging.WARNING):
        first, second = JSONL(path, question_field="q", answer_field="a", thought_field="work")
    assert (first.question, first.answer, first.source) == ("What is  2+3?", "5", "jsonl/mine")
    assert first.meta == {"thought": "2+3=5", "fields": {"level": 1}}
    assert (second.answer, second.meta) == ("8.5", {})
    assert "1 of 3 questions are repeats" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x", "ans', r"mine\.jsonl:2: not JSON"),
        ('["question"]', r"mine\.jsonl:2: got list"),
        ('{"qestion": "x", "answer": "1"}', r"mine\.jsonl:2: no field 'question'; did you mean 'qestion'"),
        ('{"question": "x", "answer": null}', r"mine\.jsonl:2: field 'answer' is None"),
        ('{"question": "  ", "answer": "1"}', r"mine\.jsonl:2: field 'question'"),
        ('{"question": "x", "answer": ["1"]}', r"mine\.jsonl:2: field 'answer' is \['1'\], expected text or a number"),
        ('{"question": "x", "answer": NaN}', r"mine\.jsonl:2: field 'answer' is nan, expected text or a finite number"),
        ('{"question": "x", "answer": 1e999}', r"mine\.jsonl:2: field 'answer' is inf"),
        ('{"question": "x \\ud83d", "answer": 1}', r"mine\.jsonl:2: field 'question' holds half a character, '.ud83d'"),
        ('{"question": ' + "[" * 100_000, r"mine\.jsonl:2: not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "mine.jsonl", {"question": "ok", "answer": "1"}, line)
    with pytest.raises(DataError, match=message):
        list(JSONL(path))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "café", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not JSON"):
        list(JSONL(str(path)))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
@pytest.mark.parametrize("source", [JSONL, GSM8K])
def test_a_file_without_problems_is_named(tmp_path, content, source):
    path = tmp_path / "none.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"none\.jsonl holds no problems; give one object per line"):
        list(source(str(path)))


def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    lines = ['{"question": "What is 1+2?", "answer": "3"}', '{"question": "What is 1+é?", "answer": 4}']
    plain, windows = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    plain.write_bytes("\n".join(lines).encode())
    windows.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert list(JSONL(str(plain), name="x")) == list(JSONL(str(windows), name="x"))


def test_a_file_that_cannot_be_read_is_named():
    with pytest.raises(DataError, match=r"/proc/self/mem cannot be read"):
        list(JSONL("/proc/self/mem"))


def test_repeats_with_another_answer_are_told(tmp_path, caplog):
    rows = [{"question": "a", "answer": "1"}, {"question": "A", "answer": "2"}, {"question": "a", "answer": "1"}]
    with caplog.at_level(logging.WARNING):
        assert [p.answer for p in JSONL(write_lines(tmp_path / "mine.jsonl", *rows))] == ["1"]
    assert "2 of 3 questions are repeats and were left out; 1 of them have another answer" in caplog.text
