"""All callbacks at once in a real reinforcement-learning run: model, engine, rubric, loop, objective, Trainer."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lit_reason.callbacks import (
    CompletionsTable,
    ExpertLoad,
    NonFiniteGuard,
    PlainProgress,
    Report,
    RoleLRMonitor,
    RolloutProgress,
)
from lit_reason.data import ByteTokenizer, PromptCursor, PromptData, ReasoningGym
from lit_reason.loop import RolloutLoop, RoundShape, Stages
from lit_reason.models import ModelConfig, Transformer
from lit_reason.modules import PolicyModule
from lit_reason.objectives import Objective
from lit_reason.optim import AdamW
from lit_reason.report import find_metric
from lit_reason.rewards import FormatApprox, ItemReward, Rubric
from lit_reason.rollout import BuiltinEngine, Sampling, request_seed

P, G, ROUNDS = 3, 4, 3


class Even(ItemReward):
    """Share of even tokens: varies within every group, untrained model or not."""

    def score(self, prompt, completion):
        return sum(token % 2 == 0 for token in completion.token_ids) / len(completion.token_ids)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    L.seed_everything(0)
    model = Transformer(ModelConfig(width=32, depth=2, heads=2, experts=4, ffn_width=64, expert_width=32))
    axes = yaml.safe_load((Path(__file__).parents[2] / "conf/algorithm/gdpo.yaml").read_text())
    axes.pop("_target_")
    policy = PolicyModule(model, AdamW(lr=0.004), Objective(**axes))
    engine, sampling = BuiltinEngine(ByteTokenizer(), dtype="float32"), Sampling(max_tokens=12)
    rubric = Rubric({"format": FormatApprox(), "even": Even(1.0)})
    stages = Stages(
        push=lambda version: engine.push(policy.model, version),
        generate=lambda prompts, seeds, idx: engine.generate(prompts, sampling, seeds, idx),
        score=rubric.score,
        assess=policy.objective.assess,
    )
    prompts = PromptData(ReasoningGym({"chain_sum": {"max_terms": 2}}, size=20, seed=0)).prompts("all")
    loop = RolloutLoop(
        PromptCursor(prompts, seed=0),
        stages,
        RoundShape(rounds=ROUNDS, prompts_per_round=P, group_size=G, micro_batches=2),
        request_seed=request_seed,
        seed=0,
        max_completion=12,
        on_round=policy.on_round,
    )
    ours = [CompletionsTable(), ExpertLoad(), NonFiniteGuard(), PlainProgress(), RoleLRMonitor(), RolloutProgress()]
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[*ours, Report()],
        accelerator="cpu",
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(policy, loop)
    steps = [json.loads(line) for line in (folder / "metrics" / "steps.jsonl").read_text().splitlines()]
    files = sorted((folder / "completions").iterdir())
    return folder, steps, [[json.loads(line) for line in f.read_text().splitlines()] for f in files]


def test_every_completion_of_every_round_is_kept(run):
    _, _, rounds = run
    assert [len(rows) for rows in rounds] == [P * G] * ROUNDS
    assert [{r["version"] for r in rows} for rows in rounds] == [{0}, {1}, {2}]
    assert all([r["sample_idx"] for r in rows] == list(range(G)) * P for rows in rounds)


def test_table_and_record_tell_the_same(run):
    _, steps, rounds = run
    for record, rows in zip(steps, rounds, strict=True):
        assert record["reward/even/mean"] == pytest.approx(sum(r["rewards"]["even"] for r in rows) / len(rows))
        assert record["completion/length"] == pytest.approx(sum(r["tokens"] for r in rows) / len(rows))
        spread = torch.tensor([r["advantage"] for r in rows]).std(correction=0).item()
        assert record["advantage/std"] == pytest.approx(spread, abs=1e-5)


def test_every_logged_name_is_documented(run):
    _, steps, _ = run
    names = {name for record in steps for name in record if name != "step" and not name.endswith("/se")}
    assert {"loss", "entropy", "expert/max_violation", "expert/dead", "reward/format/mean", "reward/format/se"} <= set(
        steps[-1]
    )
    assert any(name.startswith("lr/") for name in names)
    for name in names:
        find_metric(name)


def test_the_report_is_there(run):
    folder, _, _ = run
    assert (folder / "report.png").stat().st_size > 10_000
    assert "reward/even/mean" in (folder / "report.html").read_text()
