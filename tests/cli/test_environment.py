"""A run with tools: from the command line's words to a trained model, its evaluation and single questions."""

import csv
import json
from dataclasses import replace

import pytest

from lit_reason.cli import eval as evaluation
from lit_reason.cli import generate, train
from lit_reason.config.compose import compose
from lit_reason.config.stage import without_hydra
from lit_reason.data import ByteTokenizer
from lit_reason.errors import ConfigError
from lit_reason.rollout import BuiltinEngine

TINY = [
    *("stages=[rl]", "init=null", "model=tiny", "data.source.size=300", "evaluation.n=4"),
    *("reward=[answer,length]", "rollout.sampling.max_tokens=40", "rollout.shape.rounds=1", "extras.threads=1"),
    *("callbacks=[report,completions]",),
    *("rollout.shape.prompts_per_round=4", "rollout.shape.group_size=4", "rollout.shape.micro_batches=2"),
]  # fmt: skip


def tree(kind, *line):
    return without_hydra(compose(kind, list(line)))


@pytest.fixture
def calling(monkeypatch):
    """A policy whose first turn is a call, which the random one will not write; what follows is its own."""
    own, call = BuiltinEngine.generate, tuple(b"<calculator>6*7</calculator>")

    def generate(self, prompts, *args, **kwargs):
        done = own(self, prompts, *args, **kwargs)
        first = [ByteTokenizer().decode(prompt.token_ids).endswith("<|assistant|>") for prompt in prompts]
        forced = {"token_ids": call, "logprobs": (-1.0,) * len(call), "finish_reason": "length"}
        return [replace(c, **forced) if begins else c for c, begins in zip(done, first, strict=True)]

    monkeypatch.setattr(BuiltinEngine, "generate", generate)


def test_rl_evaluation_and_questions_go_through_the_environment(tmp_path, calling):
    cfg = tree("train", *TINY, "environment=calculator", "rollout.sampling.max_tokens=60", f"run_dir={tmp_path}/run")
    train.check(cfg)
    train.run(cfg)
    folder = tmp_path / "run" / "rl"
    texts = [json.loads(line)["text"] for path in folder.rglob("step-*.jsonl") for line in path.open()]
    assert len(texts) == 16 and all(t.startswith("<calculator>6*7</calculator><result>42</result>") for t in texts)
    losses = [
        float(row["loss"]) for path in folder.rglob("*.csv") for row in csv.DictReader(path.open()) if row.get("loss")
    ]
    assert losses and all(abs(loss) < 1e6 for loss in losses)
    assert "environment:" in (folder / "model" / "README.md").read_text()
    model = f"checkpoint=dir:{folder}/model"
    shape = ["environment=calculator", "data.source.size=300", "rollout.sampling.max_tokens=60"]
    cfg = tree("eval", model, *shape, "n=3", "reward=[answer]", f"run_dir={tmp_path}/eval", "device=cpu")
    evaluation.check(cfg)
    report = evaluation.run(cfg)
    assert all("<result>42</result>" in item.completion for item in report.items)
    cfg = tree("generate", model, *shape[::2], "prompt=What is 6 * 7?", f"run_dir={tmp_path}/g", "device=cpu")
    generate.check(cfg)
    assert "<result>42</result>" in generate.run(cfg)[0].text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["environment=calculator", "environment.max_turns=0"], "environment.max_turns=0"),
        (["environment=python", "environment.tools.python.max_chars=9999"], "1 to 700"),
        (["environment=python", "environment.tools.python.isolation=bwarp"], "bwrap"),
        (["environment=calculator", "environment.max_turn=3"], "max_turns"),
    ],
)
def test_wrong_settings_are_refused_before_anything_trains(words, message):
    with pytest.raises(ConfigError, match=message):
        train.check(tree("train", *TINY, *words))
