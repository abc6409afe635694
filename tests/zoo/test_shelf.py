"""The shelf that ships: every entry is whole, small, and computes what it computed when it was saved."""

import pytest

from lit_reason import zoo
from lit_reason.data import PromptData, ReasoningGym
from lit_reason.evaluate import evaluate
from lit_reason.rewards import AnswerExact, Rubric
from lit_reason.rollout import BuiltinEngine, Sampling

NAMES = zoo.list_models()


def test_the_shelf_has_the_primed_and_the_trained_model():
    assert {"arith-1m.sft", "arith-1m.gdpo"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_entry_is_whole_small_and_computes_the_same(name):
    found = zoo.verify(name)
    assert found.max_error <= found.tolerance
    largest = max((zoo.default_shelf() / name).rglob("*"), key=lambda path: path.stat().st_size)
    assert largest.stat().st_size < 15e6, "entries live in git: files under 15 MB"
    assert found.size < 60e6


@pytest.mark.parametrize("name", NAMES)
def test_dimensions_run_in_every_engine(name):
    config = zoo.load(name).model.config
    assert config.width % 32 == 0
    assert config.norm_eps == 1e-6
    assert config.qk_head_dim in (32, 64, 80, 96, 112, 128, 192)


def test_training_paid_on_held_out_problems():
    # 200 held-out problems: the cards' intervals do not overlap, so a quarter of their size tells the two apart too.
    source = ReasoningGym({"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}}, size=2500)
    prompts = PromptData(source).test_prompts(200)
    accuracy = {}
    for name in ("arith-1m.sft", "arith-1m.gdpo"):
        found = zoo.load(name)
        engine = BuiltinEngine(found.tokenizer)
        engine.push(found.model, 0)
        report = evaluate(engine, prompts, Rubric({"answer": AnswerExact()}), sampling=Sampling(max_tokens=48))
        accuracy[name] = report.pass_at_1.value
    assert accuracy["arith-1m.gdpo"] > accuracy["arith-1m.sft"] + 0.1
