"""The console scripts, run in this process: exit codes, messages, run directories, the way from stage to stage."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

from lit_reason import zoo
from lit_reason.cli import eval as eval_script
from lit_reason.cli import generate, stages, train
from lit_reason.cli.launch import check_device, pick_device, preflight
from lit_reason.config import stage_config
from lit_reason.config.compose import compose, parse_argv
from lit_reason.config.stage import without_hydra
from lit_reason.data import ByteTokenizer
from lit_reason.errors import CheckpointError, ConfigError
from lit_reason.models import ModelConfig, Transformer

SMALL = [
    *("model=tiny", "data.source.size=300", "evaluation.n=4", "rollout.sampling.max_tokens=8", "extras.threads=1"),
    *("rollout.shape.rounds=2", "rollout.shape.prompts_per_round=2", "rollout.shape.group_size=2"),
    *("rollout.shape.micro_batches=1", "priming.n_examples=40", "callbacks=[checkpoint,rng,report]"),
    *("callbacks.checkpoint.every_n_train_steps=1", "trainer.enable_progress_bar=false", "reward.length.max_tokens=8"),
    *("reward.length.buffer=2", "trainer.precision=32-true", "pretrain.optimizer.warmup_steps=0"),
    *("sft.optimizer.warmup_steps=0", "pretrain.trainer.max_steps=2", "sft.trainer.max_steps=2"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    GlobalHydra.instance().clear()


def call(main, *argv):
    """The script's exit code."""
    sys.argv[1:] = argv
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_ctrl_c_outside_training_is_a_line_and_not_a_traceback(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "evaluate_model", interrupt)
    assert call(train.main, "init=null", *SMALL) == 130
    assert "goes on" in capsys.readouterr().err


def test_a_checkpoint_is_looked_for_before_anything_is_evaluated(monkeypatch, capsys):
    monkeypatch.setattr(stages, "evaluate_model", lambda *args: pytest.fail("evaluated"))
    (broken := Path("empty")).mkdir()
    assert call(train.main, "init=null", f"resume={broken}", *SMALL) == 1
    assert "no finished checkpoint" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-reason-test"])


@pytest.fixture
def saved(tmp_path):
    model = Transformer(
        ModelConfig(width=32, depth=2, heads=2, kv_lora_rank=16, ffn_width=64, experts=4, expert_width=32)
    )
    info = {"recipe": "none", "seed": 0, "commit": "none", "metrics": {}}
    return zoo.save(tmp_path / "shelf" / "model", model, ByteTokenizer(), info)


@pytest.mark.parametrize(
    "override",
    [
        *("algorithm=gpdo", "model.widht=3", "+model.widht=3", "resume=atuo", "model._target_=os.system"),
        *("model.rope_tehta=3", "rollout.shape.group_size=1"),
    ],
)
def test_a_mistake_ends_with_code_2_one_message_and_no_folder(override, folder, capsys):
    assert call(train.main, override) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and any(word in said for word in ("did you mean", "refused", "valid: 2 or more"))
    assert list(folder.iterdir()) == []


def test_a_mistake_in_one_value_of_a_sweep_stops_before_job_one(folder, capsys):
    assert call(train.main, "-m", "algorithm=grpo,gpdo", "seed=1,2") == 2
    assert "gpdo" in capsys.readouterr().err and list(folder.iterdir()) == []


def test_a_yamls_own_sweep_of_an_unlisted_parameter_names_the_key_to_write(folder, capsys):
    (folder / "conf" / "hparams_search").mkdir(parents=True)
    file = folder / "conf" / "hparams_search" / "decay.yaml"
    text = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {KEY: '0.0,0.1'}}}\n"
    file.write_text(text.replace("KEY", "optimizer.weight_decay"))
    line = ["--config-dir", str(file.parents[1]), "hparams_search=decay"]
    assert call(train.main, *line) == 2
    assert "Write '++optimizer.weight_decay': VALUES there" in capsys.readouterr().err
    for good in ("++optimizer.weight_decay", "optimizer.lr"):
        file.write_text(text.replace("KEY", good))
        preflight("train", parse_argv(line), train.check)


def test_hydra_is_handed_the_plus_of_a_parameter_that_no_yaml_lists(folder, capsys):
    assert call(train.main, "--cfg", "job", "--package", "model", "model.rope_theta=5e5", "model.width=64") == 0
    said = capsys.readouterr().out
    assert "rope_theta: 500000.0" in said and "width: 64" in said


def test_three_stages_then_nothing_left_to_do_then_further(folder, monkeypatch, capsys):
    line = ["experiment=arith_from_scratch", *SMALL]
    assert call(train.main, *line) == 0
    run = folder / "runs" / "arith_from_scratch-1"
    done = {stage: json.loads((run / stage / "done.json").read_text()) for stage in ("pretrain", "sft", "rl")}
    assert all(record["weights"] == "model" for record in done.values())
    assert json.loads((run / "rl" / "summary.json").read_text())["n"] == 4
    primed, trained = zoo.load(run / "sft" / "model").model, zoo.load(run / "rl" / "model").model
    assert any(not a.equal(b) for a, b in zip(primed.parameters(), trained.parameters(), strict=True))

    monkeypatch.setattr(train, "stage_functions", dict)  # nothing can be trained from here on
    assert call(train.main, *line) == 0
    spelt_out = ["model.rope_theta=10000.0", "optimizer.weight_decay=0.01", "text.facts_fraction=0.2"]
    assert call(train.main, *line, *spelt_out) == 0  # the defaults: nothing has changed
    assert yaml.safe_load((run / "sft" / "config.yaml").read_text())["optimizer"]["weight_decay"] == 0.01
    capsys.readouterr()
    for change, said in (
        ("model.heads=1", "model.heads: got 1"),
        ("model.rope_theta=5e5", "model.rope_theta: got 500000.0, saved 10000.0"),
        ("sft.trainer.max_steps=3", "got 3, saved 2"),
        ("evaluation.n=5", "evaluation.n: got 5, saved 4"),
        ("trainer.gradient_clip_val=2.0", "trainer.gradient_clip_val: got 2.0, saved 1.0"),
    ):
        assert call(train.main, *line, change) == 1
        assert said in capsys.readouterr().err


def test_a_parameter_that_is_new_since_a_run_began_is_no_change(folder, monkeypatch):
    """The run's records are those of a code whose classes had fewer parameters."""
    line = ["stages=[pretrain]", "trainer.max_steps=5", "optimizer.warmup_steps=0", "run_dir=old"]
    record, weights = folder / "old" / "pretrain", folder / "old" / "pretrain" / "model"
    cfg = without_hydra(compose("train", line))
    settings = train._settings(stage_config(cfg, "pretrain"))
    for key in ("rope_theta", "yarn"):
        del settings["model"][key]
    weights.mkdir(parents=True)
    (record / "checkpoints").mkdir()
    (record / "checkpoints" / "step=5.ckpt").touch()
    (record / "config.yaml").write_text(yaml.safe_dump(settings))
    train.Done(record / "done.json", fill=dict).write(weights, settings)
    monkeypatch.setattr(train, "stage_functions", dict)  # nothing can be trained
    assert train.run(cfg) == weights
    with pytest.raises(CheckpointError, match=r"model\.rope_theta: got 500000\.0, saved 10000\.0"):
        train.run(without_hydra(compose("train", [*line, "model.rope_theta=5e5"])))


def test_a_stage_that_was_cut_off_goes_on_and_hands_its_weights_on(folder, monkeypatch):
    line = ["experiment=arith_from_scratch", *SMALL, "stages=[pretrain,sft]", "pretrain.trainer.max_steps=3"]
    functions, seen = train.stage_functions(), []

    def cut_off(cfg, weights):
        cfg.trainer.max_steps = 2
        functions["pretrain"](cfg, weights)
        raise KeyboardInterrupt

    def watched(cfg, weights):
        seen.append(weights)
        return functions["sft"](cfg, weights)

    monkeypatch.setattr(train, "stage_functions", lambda: {"pretrain": cut_off})
    assert call(train.main, *line) == 130
    GlobalHydra.instance().clear()
    run = folder / "runs" / "arith_from_scratch-1"
    assert not (run / "pretrain" / "done.json").exists()
    monkeypatch.setattr(train, "stage_functions", lambda: functions | {"sft": watched})
    assert call(train.main, *line, "trainer.gradient_clip_val=2.0") == 1
    assert call(train.main, *line, "evaluation.n=5") == 0  # an evaluation that is still to come may change
    rows = [json.loads(text)["step"] for text in (run / "pretrain" / "metrics" / "steps.jsonl").open()]
    assert rows == [0, 1, 2]
    assert seen == [run / "pretrain" / "model"]


def test_eval_writes_items_and_keeps_earlier_ones(saved, folder, capsys):
    line = [f"checkpoint='dir:{saved}'", "n=5", "k=2", "run_name=mine", "data.source.size=300", "extras.threads=1"]
    assert call(eval_script.main, *line, "rollout.sampling.max_tokens=6") == 0
    items = (folder / "runs" / "mine" / "items.jsonl").read_text().splitlines()
    summary = json.loads((folder / "runs" / "mine" / "summary.json").read_text())
    assert len(items) == 5 * (1 + 2) and summary["n"] == 5 and summary["k"] == 2
    assert "pass@1" in capsys.readouterr().out
    assert call(eval_script.main, *line, "rollout.sampling.max_tokens=6") == 0
    assert (folder / "runs" / "mine" / "items.old-1.jsonl").read_text().splitlines()[0] == items[0]
    assert call(eval_script.main, "n=0", "checkpoint=x") == 2
    assert call(eval_script.main) == 2 and "checkpoint=VALUE" in capsys.readouterr().err


def test_generate_prints_every_completion(saved, capsys):
    line = [f"checkpoint='dir:{saved}'", "rollout.sampling.max_tokens=4", "extras.threads=1"]
    assert call(generate.main, *line, 'prompt="What is 1 + 2?"', "n=3", "rollout.sampling.temperature=1") == 0
    out = capsys.readouterr().out
    assert "What is 1 + 2?" in out and out.count("  ") >= 3
    assert call(generate.main, *line, "prompt=12", "n=3") == 2
    assert "rollout.sampling.temperature=1" in capsys.readouterr().err
    assert call(generate.main, "checkpoint=nothing", "prompt=12") == 1


def test_the_evaluations_of_a_run_are_on_the_trainers_device(folder, monkeypatch):
    """The strategy's device is written `cpu:0` here, so that it cannot be taken for a default."""
    evaluate, seen = stages.evaluate_model, []
    monkeypatch.setattr(stages, "evaluate_model", lambda *args: seen.append(args[3]) or evaluate(*args))
    strategy = "+trainer.strategy={_target_: lightning.pytorch.strategies.SingleDeviceStrategy, device: 'cpu:0'}"
    line = ["experiment=arith_from_scratch", *SMALL, "stages=[sft,rl]", strategy, "trainer.accelerator=auto"]
    assert call(train.main, *line) == 0
    assert seen == [torch.device("cpu:0")] * 3  # after priming; before and after RL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_evaluations_of_a_run_on_a_gpu_are_on_the_gpu(folder, monkeypatch):
    evaluate, seen = stages.evaluate, []

    def watched(engine, *args, **kwargs):
        seen.append(engine.model.embed.weight.device.type)
        return evaluate(engine, *args, **kwargs)

    monkeypatch.setattr(stages, "evaluate", watched)
    assert call(train.main, "experiment=arith_from_scratch", *SMALL, "stages=[sft,rl]", "trainer=gpu") == 0
    assert seen == ["cuda"] * 3


@pytest.mark.parametrize(("there", "picked"), [(True, "cuda"), (False, "cpu")])
def test_the_device_of_eval_and_generate(there, picked, monkeypatch, saved):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto") == torch.device(picked) and pick_device("cpu") == torch.device("cpu")
    for name in ("eval", "generate"):
        assert compose(name, ["checkpoint=x"]).device == "auto"
        if not there:
            with pytest.raises(ConfigError, match=r"device=cuda: torch finds no CUDA device here\. Type device=auto"):
                check_device(compose(name, ["checkpoint=x", "device=cuda"]))
        with pytest.raises(ConfigError, match=r"device=gpu: .*valid: auto, cpu, cuda"):
            check_device(compose(name, ["checkpoint=x", "device=gpu"]))
    asked = []
    monkeypatch.setattr(Transformer, "to", lambda self, device: asked.append(device) or self)
    line = [
        f"checkpoint='dir:{saved}'",
        "rollout.sampling.max_tokens=4",
        "extras.threads=1",
        "rollout.engine.dtype=float32",
    ]
    assert call(generate.main, *line, "prompt=12") == 0
    GlobalHydra.instance().clear()
    assert call(eval_script.main, *line, "n=2", "data.source.size=300") == 0
    assert asked == [torch.device(picked)] * 2
