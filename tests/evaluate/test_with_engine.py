"""`evaluate` with the builtin engine, the real rubric and real prompts."""

import json

import pytest
import torch

from lit_reason.data import ByteTokenizer, PromptData, ReasoningGym
from lit_reason.evaluate import compare, evaluate
from lit_reason.models import ModelConfig, Transformer
from lit_reason.rewards import AnswerAnywhere, AnswerExact, FormatExact, Rubric
from lit_reason.rollout import BuiltinEngine, Sampling


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    config = ModelConfig(width=32, depth=2, heads=2, experts=4, ffn_width=64, expert_width=32)
    engine = BuiltinEngine(ByteTokenizer(), dtype="float32")
    engine.push(Transformer(config), 4)
    data = PromptData(ReasoningGym({"chain_sum": {"max_terms": 2}}, size=40, seed=0))
    rubric = Rubric({"answer": AnswerExact(), "format": FormatExact(), "answer_anywhere": AnswerAnywhere(weight=0.0)})
    return engine, data.prompts("all")[:12], rubric


def test_the_same_seed_gives_the_same_report(setup, tmp_path):
    engine, prompts, rubric = setup
    sampling, events = Sampling(max_tokens=8), []
    runs = [
        evaluate(engine, prompts, rubric, sampling=sampling, k=2, seed=s, progress=events.append) for s in (1, 1, 2)
    ]
    texts = [[i.completion for i in r.samples] for r in runs]
    assert texts[0] == texts[1] != texts[2]
    assert runs[0].items == runs[2].items  # greedy needs no seed
    assert {i.version for i in runs[0].items} == {4}
    assert events[-1].done == events[-1].total == 2 * len(prompts)
    # an untrained model answers nothing: the interval still has a width, and nothing improved
    assert runs[0].pass_at_1.value == 0 and runs[0].pass_at_1.high > 0.1
    assert runs[0].pass_at_1_format_blind is not None
    assert compare(runs[0], runs[1]).verdict == "no difference shown"
    runs[0].write_jsonl(tmp_path / "items.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * len(prompts) and {r["prompt_id"] for r in rows} == {p.id for p in prompts}
    assert json.loads(json.dumps(runs[0].summary()))["n"] == len(prompts)
