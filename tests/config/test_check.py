"""What can be known to be wrong is said before anything is built."""

from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from lit_reason.config.check import accepts, check_config, check_run
from lit_reason.config.stage import stage_config
from lit_reason.errors import ConfigError, UnsafeTargetError

MODEL = {"_target_": "lit_reason.models.ModelConfig", "width": 64}
RUN = {"stages": ["rl"], "resume": "auto", "seed": 1, "tags": [], "run_dir": "runs/x", "allow_targets": []}


def test_a_good_tree_passes():
    check_config(
        OmegaConf.create({"model": MODEL, "reward": {"answer": {"_target_": "lit_reason.rewards.AnswerExact"}}})
    )


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (MODEL | {"widht": 3}, r"unknown key model\.widht .*did you mean 'width'"),
        (MODEL | {"width": "abc"}, r"model\.width='abc' is not valid: expected int"),
        (MODEL | {"width": 64.5}, r"model\.width=64\.5"),
        (MODEL | {"width": True}, r"model\.width=True"),
        (MODEL | {"width": None}, r"model\.width=None"),
        (MODEL | {"_partal_": True}, r"unknown key model\._partal_: did you mean '_partial_'"),
        ({"_target_": "lit_reason.models.ModelConfg"}, r"did you mean 'ModelConfig'"),
        ({"_target_": "lit_reason.modles.ModelConfig"}, "does not exist"),
        (
            {"_target_": "torch.nn.Linear", "in_features": 2},
            r"model\.out_features is required .*Type: model\.out_features=VALUE",
        ),
        ({"_target_": "lightning.pytorch.Trainer", "precision": "bf16-mixd"}, "did you mean 'bf16-mixed'"),
    ],
)
def test_each_mistake_is_named(node, said):
    with pytest.raises(ConfigError, match=said):
        check_config(OmegaConf.create({"model": node}))


def test_required_arguments_may_come_from_code_or_later():
    node = {"_target_": "torch.nn.Linear", "in_features": 2}
    check_config({"layer": node}, provided={"layer": ["out_features"]})
    check_config({"layer": node | {"_partial_": True}})
    check_config({"layer": {"_target_": "torch.nn.Linear", "_args_": [2, 3]}})


def test_a_hostile_target_is_refused_by_the_check_too():
    with pytest.raises(UnsafeTargetError):
        check_config({"a": [{"_target_": "os.system"}]})


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (3, float, True),
        (3.0, int, False),
        (None, int | None, True),
        (None, str, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"] | None, False),
        ("x", Path, True),
        (["x"], str, False),
        (False, bool, True),
        (0, bool, False),
    ],
)
def test_accepts(value, hint, fits):
    assert accepts(value, hint) is fits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": ["pretain"]}, "did you mean 'pretrain'"),
        ({"stages": []}, "stages"),
        ({"stages": ["rl", "sft"]}, "in the order pretrain, sft, rl"),
        ({"stages": ["rl", "rl"]}, "once"),
        ({"resume": "atuo"}, "did you mean 'auto'"),
        ({"resume": "/nowhere/x.ckpt"}, "checkpoint that exists"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "one"}, "seed='one'"),
        ({"tags": "a"}, r"'tags=\[a\]'"),
        ({"init": "???"}, "Type: init=VALUE"),
        ({"allow_targets": ["os"]}, "stays closed"),
    ],
)
def test_run_level_mistakes(change, said):
    check_run(OmegaConf.create(RUN))
    with pytest.raises((ConfigError, UnsafeTargetError), match=said):
        check_run(OmegaConf.create(RUN | change))


@pytest.mark.parametrize("run_dir", ["taken", "taken/below"])
def test_a_run_dir_that_is_a_file(tmp_path, run_dir):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"taken is a file\. Type run_name="):
        check_run(OmegaConf.create(RUN | {"run_dir": str(tmp_path / run_dir)}))


def test_a_stage_sees_its_own_block_and_folder():
    cfg = OmegaConf.create(
        RUN
        | {
            "trainer": {"max_steps": 7, "devices": 1},
            "log": {"dir": "${run_dir}/m"},
            "sft": {"trainer": {"max_steps": 2}},
        }
    )
    OmegaConf.set_struct(cfg, True)
    sft, rl = stage_config(cfg, "sft"), stage_config(cfg, "rl")
    assert (sft.trainer.max_steps, sft.trainer.devices, rl.trainer.max_steps) == (2, 1, 7)
    assert (sft.log.dir, rl.log.dir) == ("runs/x/sft/m", "runs/x/rl/m")
    assert "sft" not in sft and cfg.trainer.max_steps == 7


def test_a_stage_block_with_an_unknown_key_is_refused():
    cfg = OmegaConf.create(RUN | {"trainer": {"max_steps": 7}, "sft": {"trainr": {"max_steps": 2}}})
    with pytest.raises(ConfigError, match=r"unknown key sft\.trainr: did you mean 'trainer'"):
        stage_config(cfg, "sft")
