"""balance.py: its arithmetic, and a small real run; bench_speculative.py and mup_in_use.py on small models."""

from __future__ import annotations

import argparse
import json
from functools import partial

import pytest
import torch

from lit_reason import zoo
from lit_reason.data import ByteTokenizer
from lit_reason.models import ModelConfig, Transformer
from lit_reason.types import Prompt


@pytest.fixture
def balance(load, monkeypatch):
    module = load("balance")
    monkeypatch.setattr(module, "source_rows", partial(module.source_rows, max_bytes=80_000))
    monkeypatch.setattr(module, "VALIDATION_ROWS", 32)
    return module


def test_from_which_step_on_the_limit_is_kept(balance):
    violation = [2.0] * 20 + [0.4] * 30
    # windows that end at step 28 or before hold two or more steps of 2.0: 0.2 * 2 + 0.8 * 0.4 = 0.72; one: 0.56
    assert balance.steps_to_limit(violation) == 30
    assert balance.steps_to_limit([0.4] * 20) == 10
    assert balance.steps_to_limit([0.4] * 20 + [2.0] * 10) is None
    assert balance.steps_to_limit([0.4] * 5) is None  # too short to say


def test_what_the_bias_must_keep_to(balance):
    good = {"max_violation": (0.3, 0.0), "max_violation_val": (0.2, 0.0), "dead": 0, "val_minus_bias": (0.0, 0.0)}
    found = {"bias": good, "loss 0.01": good | {"val_minus_bias": (0.01, 0.0)}, "neither": good}
    assert balance.violations(found) == []
    found["neither"] = good | {"val_minus_bias": (-0.5, 0.0)}  # the control may be better
    assert balance.violations(found) == []
    for changed, said in (({"dead": 2}, "2 experts dead"), ({"max_violation_val": (0.5, 0.0)}, "0.50")):
        assert said in balance.violations(found | {"bias": good | changed})[0]
    found["loss 0.01"] = good | {"val_minus_bias": (-0.01, 0.004)}
    assert "lower than with the bias by 0.0100" in balance.violations(found)[0]
    found["loss 0.01"] = good | {"val_minus_bias": (-0.01, 0.006)}  # within two standard errors
    assert balance.violations(found) == []


def test_the_bias_balances_and_nothing_does_not(balance, tmp_path):
    argv = ["--width", "64", "--experts", "8", "--steps", "40", "--batch", "8", "--seq-len", "32", "--seeds", "1"]
    argv += ["--bias-rate", "0.02", "--alphas", "0.01", "--out", str(tmp_path), "--check"]
    assert balance.main(argv) == 1  # 40 steps are too few for every batch
    record = json.loads((tmp_path / "balance.json").read_text())
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")
    assert list(record["summary"]) == ["bias", "loss 0.01", "neither"]
    after = {name: row["max_violation_val"][0] for name, row in record["summary"].items()}
    assert after["bias"] < 0.5 * after["neither"]
    assert record["summary"]["bias"]["val_minus_bias"][0] == 0
    assert len(record["runs"][0]["violation"]) == 40 and 1.5 < record["runs"][0]["val"] < 5.6


def test_drafts_give_the_same_completions(load):
    bench = load("bench_speculative")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=32, depth=2, heads=2, max_seq_len=64, mtp_depth=1))
    loaded = argparse.Namespace(model=model, tokenizer=ByteTokenizer())
    prompts = [Prompt(str(i), "", "", "test", tuple(range(65 + i, 75 + i))) for i in range(6)]
    row = bench.compare(loaded, prompts, 4, argparse.Namespace(dtype="float32", max_tokens=12, repeats=2))
    assert row["same"] == row["prompts"] == 6
    assert (
        len(row["plain"]) == len(row["drafts"]) == len(row["ratios"]) == 2 and row["accepted"] < 0.5
    )  # of an untrained module


def test_a_row_of_a_finished_run(load, tmp_path):
    in_use = load("mup_in_use")
    metric = {"pass_at_1": {"value": 0.5, "ci": [0.4, 0.6], "n": 100}}
    info = {"recipe": "none", "seed": 3, "commit": "0123abc", "metrics": metric}
    model = Transformer(ModelConfig(width=32, depth=2, heads=2))
    zoo.save(tmp_path / "sft" / "model", model, ByteTokenizer(), info)
    (tmp_path / "pretrain" / "metrics").mkdir(parents=True)
    (tmp_path / "pretrain" / "config.yaml").write_text(
        "model: {width: 32}\noptimizer: {lr: 0.004}\ntext: {batch_size: 8, seq_len: 128}\nseed: 3\n"
    )
    steps = [{"loss": 5.0}] * 14 + [{"loss": 1.0}, {"loss": 2.0}]  # the last eighth is two steps
    (tmp_path / "pretrain" / "metrics" / "steps.jsonl").write_text("\n".join(map(json.dumps, steps)))
    row = in_use.read(tmp_path)
    assert (row["loss"], row["lr"], row["width"], row["steps"]) == (1.5, 0.004, 32, 16)
    assert (row["pass_at_1"], row["interval"], row["problems"]) == (0.5, [0.4, 0.6], 100)
