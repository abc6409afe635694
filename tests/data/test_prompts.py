"""The split hangs on the question alone; prompts are tokenised, bounded and never empty."""

import logging

import pytest

from lit_reason.data import (
    ByteTokenizer,
    ChatTemplate,
    PromptData,
    ReasoningGym,
    canonical,
    held_out,
    load_prompts,
    prompt_id,
)
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt

FEW = {"chain_sum": {"max_terms": 2, "max_digits": 1}}  # 200 questions


def make(question, answer="1"):
    return Prompt(prompt_id(question), question, answer, "test")


def test_canonical_questions():
    same = ["What is ２＋３?", " what\tis\n2+3? ", "WHAT IS 2+3?"]
    assert {canonical(q) for q in same} == {"what is 2+3?"}
    # sha256("what is 2+3?") by `printf 'what is 2+3?' | sha256sum`
    assert prompt_id(same[0]) == "609d8293b05dab24"
    assert prompt_id("what is 2 + 3?") != prompt_id(same[0])


def test_held_out_share_and_nesting():
    ids = [prompt_id(str(i)) for i in range(10_000)]
    chosen = {f: {i for i in ids if held_out(i, f)} for f in (0.0, 0.1, 0.2, 1.0)}
    assert len(chosen[0.0]) == 0 and len(chosen[1.0]) == 10_000
    # binomial: 4 standard deviations are 120
    assert abs(len(chosen[0.1]) - 1000) < 120
    assert chosen[0.1] < chosen[0.2]
    assert held_out("ffffffffffffffff", 1.0) and not held_out("0000000000000000", 0.0)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        held_out(ids[0], 10)


def test_train_and_test_are_disjoint_whatever_the_seeds():
    train = [p for seed in (0, 1, 2) for p in PromptData(ReasoningGym(FEW, 150, seed)).train_prompts()]
    test = [p for seed in (1, 2, 3) for p in PromptData(ReasoningGym(FEW, 150, seed)).test_prompts()]
    questions = {canonical(p.question) for p in train}, {canonical(p.question) for p in test}
    assert len(questions[0]) > 150 and len(questions[1]) > 10
    assert not questions[0] & questions[1]
    # together they cover nearly the whole task: disjoint by the split, not by luck
    assert len(questions[0] | questions[1]) > 190


def test_prompts_carry_their_template():
    (prompt,) = load_prompts([make("1 + 2 =")], held_out_fraction=0.0)
    assert prompt.token_ids == tuple(ChatTemplate().prompt_ids(ByteTokenizer(), "1 + 2 ="))
    (other,) = load_prompts([make("1 + 2 =")], "all", 0.0, ByteTokenizer(), ChatTemplate(before_question="Q: "))
    assert ByteTokenizer().decode(other.token_ids) == "Q: 1 + 2 =<|assistant|>"


def test_repeats_across_a_source_are_removed():
    kept = load_prompts([make("A b", "first"), make("a  B", "second"), make("c")], held_out_fraction=0.0)
    assert [(p.question, p.answer) for p in kept] == [("A b", "first"), ("c", "1")]


def test_refusals():
    with pytest.raises(DataError, match="no prompts: the source gave 0 questions"):
        load_prompts([])
    with pytest.raises(DataError, match="gave 1 questions, of which none is on the 'test' side"):
        load_prompts([make("x")], "test", 0.0)
    # 3 template tokens and 5 bytes
    with pytest.raises(DataError, match=r"has 8 tokens, more than max_prompt_tokens=7\. Set data\.max_prompt_tokens=8"):
        load_prompts([make("1 + 2")], held_out_fraction=0.0, max_prompt_tokens=7)
    assert load_prompts([make("1 + 2")], held_out_fraction=0.0, max_prompt_tokens=8)
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        load_prompts([make("x")], "trian")  # type: ignore[arg-type]


def test_prompt_data_reads_its_source_once_and_samples_steadily(caplog):
    reads = []

    class Source:
        def __iter__(self):
            reads.append(1)
            return iter(ReasoningGym(FEW, 200))

    data = PromptData(Source(), held_out_fraction=0.25)
    train, test = data.train_prompts(), data.test_prompts()
    assert len(reads) == 1 and len(train) + len(test) == 200
    assert [p.id for p in test] == sorted(p.id for p in test)
    assert data.test_prompts(10) == test[:10]
    assert data.train_prompts(3) == [train[0], train[len(train) // 3], train[2 * len(train) // 3]]
    # the same sample, whatever the order in which a source tells it
    other = PromptData(list(reversed(list(ReasoningGym(FEW, 200)))), held_out_fraction=0.25)
    assert [p.id for p in other.test_prompts(10)] == [p.id for p in test[:10]]
    with caplog.at_level(logging.WARNING):
        assert data.test_prompts(10_000) == test
    assert "10000 held-out problems wanted" in caplog.text
