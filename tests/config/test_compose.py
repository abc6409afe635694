"""The shipped tree composes in every combination of groups, and every mistake on the command line is explained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_reason.config import check_config, check_run, instantiate, stage_config
from lit_reason.config.compose import compose, parse_argv, sweep_points, with_additions
from lit_reason.config.stage import without_hydra
from lit_reason.errors import ConfigError, UnsafeTargetError
from lit_reason.models import ModelConfig

CONF = Path(__file__).parents[2] / "conf"
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))


def options(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


VERIFIERS = {"data": "data.source", "environment": "environment", "reward": "reward.verifiers"}
# Tree i takes option i of every group, so that a few trees hold every option.
TREES = [{g: options(g)[i % len(options(g))] for g in GROUPS} for i in range(max(len(options(g)) for g in GROUPS))]


def test_every_group_of_the_design_is_there():
    names = "model data reward rollout algorithm optimizer kernels trainer callbacks logger experiment hparams_search"
    names += " reference adapter environment"
    assert sorted(f"{names} debug paths extras hydra".split()) == GROUPS


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree["reward"])
def test_every_option_composes_and_every_target_and_key_is_real(tree):
    open_values = {
        "data=jsonl": "data.source.path=x.jsonl",
        "data=reasoning_gym": "data.source.tasks={gcd: {}}",
        "model=hf": "model.name=some/name",
        "reference=teacher": "reference.name=some-name",
        **{f"{group}=verifiers": f"{key}.name=x" for group, key in VERIFIERS.items()},
    }
    overrides = [f"{group}={option}" for group, option in tree.items()]
    overrides += [open_values[chosen] for chosen in overrides if chosen in open_values]
    cfg = without_hydra(compose("train", overrides, multirun=True))
    check_run(cfg)
    for stage in ("pretrain", "sft", "rl"):
        check_config(stage_config(cfg, stage))


@pytest.mark.parametrize(
    "line",
    [
        "experiment=arith_gdpo",
        "experiment=arith_gdpo model.width=512 trainer=gpu",
        "reward=[answer,format] reward.format.weight=0.2 algorithm=dapo",
        "callbacks=[default,expert_load] ~callbacks.report logger=[csv,wandb] tags=[a,b]",
        "experiment=arith_from_scratch debug=fdr seed=7",
        "experiment=arith_from_scratch +sft.data.source.size=100 sft.trainer.max_steps=3",
    ],
)
def test_the_documented_lines_compose(line):
    cfg = without_hydra(compose("train", line.split()))
    check_run(cfg)
    for stage in cfg.stages:
        check_config(stage_config(cfg, stage))


def test_debug_reaches_every_stage():
    cfg = without_hydra(compose("train", ["experiment=arith_from_scratch", "debug=fdr"]))
    assert all(stage_config(cfg, stage).trainer.fast_dev_run for stage in cfg.stages)


def test_a_grpo_user_meets_at_most_three_levels():
    """Levels of the tree's own keys; what a target takes as a plain mapping (a task's settings) is its argument."""
    cfg = OmegaConf.to_container(without_hydra(compose("train", ["algorithm=grpo"])))
    deep = [path for path in leaves(cfg) if len(path) > 3 and path[:3] != ("data", "source", "tasks")]
    assert deep == []


def leaves(node, path=()):
    for key, child in node.items():
        if not str(key).startswith("_"):
            yield from leaves(child, (*path, key)) if isinstance(child, dict) and child else [(*path, key)]


def test_a_user_of_the_demo_meets_few_keys():
    """Counted: every leaf that can be given a value. Not counted: `_target_` and its like, empty blocks and groups, and
    where files go (`run_dir`, and the loggers' and callbacks' folders in it)."""
    cfg = OmegaConf.to_container(without_hydra(compose("train", ["experiment=arith_gdpo"])))
    met = [".".join(path) for path in leaves(cfg) if OmegaConf.select(OmegaConf.create(cfg), ".".join(path)) != {}]
    folders = {"run_dir", "callbacks.checkpoint.dirpath", "logger.csv.save_dir", "logger.csv.name"}
    assert folders < set(met)
    assert len(set(met) - folders) <= 72


@pytest.mark.parametrize("name", ["torch", "auto", "triton", "fp8", "fp8_emulated"])
def test_kernels_are_callbacks_whose_settings_are_keys(name):
    cfg = without_hydra(compose("train", [f"kernels={name}"]))
    check_config(stage_config(cfg, "rl"))
    nodes = OmegaConf.to_container(cfg.kernels)
    assert (name == "torch") == (nodes == {})
    assert {key: node["backend"] for key, node in nodes.items()} == {
        "torch": {},
        "auto": {"grouped_gemm": "auto", "fused_logprob": "auto"},
        "triton": {"grouped_gemm": "triton", "fused_logprob": "triton"},
        "fp8": {"grouped_gemm": "auto", "fused_logprob": "auto", "fp8_linear": "auto"},
        "fp8_emulated": {"grouped_gemm": "emulate", "fused_logprob": "auto", "fp8_linear": "emulate"},
    }[name]
    if name.startswith("fp8"):
        assert nodes["grouped_gemm"]["precision"] == "fp8"
        assert compose("train", [f"kernels={name}", "kernels.fp8_linear.min_features=64"]).kernels.fp8_linear


# The first three are in no YAML; of the fourth's two one is and one is not.
@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("model.rope_theta=5e5", {"model.rope_theta": 5e5, "model.width": 128}),
        ("model.base.width=32", {"model.base.width": 32}),
        ("trainer.val_check_interval=0.5", {"trainer.val_check_interval": 0.5}),
        ("priming={n_examples: 9, style: columns}", {"priming.n_examples": 9, "priming.style": "columns"}),
        ("sft.optimizer.weight_decay=0.5", {"sft.optimizer.weight_decay": 0.5}),
        ("rl.trainer.devices=1", {"rl.trainer.devices": 1}),
        ("data.source.seed=3", {"data.source.seed": 3}),
    ],
)  # fmt: skip
def test_every_parameter_of_a_target_can_be_set_without_a_plus(override, wanted):
    cfg = without_hydra(compose("train", [override]))
    assert {key: OmegaConf.select(cfg, key) for key in wanted} == wanted
    check_config(stage_config(cfg, "rl"))


def test_a_parameter_is_looked_up_in_the_option_that_is_chosen(tmp_path, monkeypatch):
    (tmp_path / "painted_pkg").mkdir()
    (tmp_path / "painted_pkg" / "__init__.py").write_text("class Model:\n    def __init__(self, colour='red'): ...\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: painted_pkg.Model\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = ["model=mine", "allow_targets=[painted_pkg]"]
    assert compose("train", [*line, "model.colour=blue"], config_dir=str(tmp_path)).model.colour == "blue"
    with pytest.raises(ConfigError, match=r"unknown key model\.rope_theta: .*valid: model\.colour\. Type one"):
        compose("train", [*line, "model.rope_theta=1"], config_dir=str(tmp_path))
    with pytest.raises(UnsafeTargetError, match="allow_targets"):
        compose("train", ["model=mine", "model.colour=blue"], config_dir=str(tmp_path))


def test_a_users_yaml_may_hold_every_parameter_too(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nmodel: {rope_theta: 5e5}\nsft: {optimizer: {weight_decay: 0.5}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    cfg = compose("train", ["experiment=mine"], config_dir=str(tmp_path))
    check_config(stage_config(cfg, "sft"))
    assert stage_config(cfg, "sft").optimizer.weight_decay == 0.5
    (tmp_path / "experiment" / "mine.yaml").write_text(text.replace("rope_theta", "rope_tehta"))
    with pytest.raises(ConfigError, match=r"model\.rope_tehta .*did you mean 'rope_theta'"):
        check_config(stage_config(compose("train", ["experiment=mine"], config_dir=str(tmp_path)), "sft"))


def test_a_swept_parameter_is_added_in_every_job():
    line = with_additions("train", ["model.rope_theta=1,2", "seed=3", "model.width=64"])
    assert line == ["++model.rope_theta=1,2", "seed=3", "model.width=64"]
    assert [p[-1] for p in sweep_points(line)] == ["++model.rope_theta=1", "++model.rope_theta=2"]


def test_the_shelfs_shape_does_not_hang_on_defaults_that_may_change():
    """`arith_1m` leaves dimensions to ModelConfig: should a default change, the YAML must state the value. A
    field that is newer than the shelf has its default there."""
    saved = json.loads((CONF.parent / "zoo" / "arith-1m.sft" / "config.json").read_text())["model"]
    assert instantiate(compose("train").model) == ModelConfig.from_dict(saved)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm=gpdo", "unknown option algorithm=gpdo: did you mean .*'gdpo'.* valid: .*dapo, .*gdpo, .*grpo"),
        ("reward=[answer,fromat]", "unknown option reward=fromat: did you mean 'format'"),
        ("algoritm=gdpo", "unknown key algoritm: did you mean 'algorithm'"),
        ("modle.width=3", "unknown key modle.width: did you mean 'model'"),
        ("model.widht=3", r"unknown key model\.widht: did you mean 'model\.width'"),
        ("optimizer.LR=3", r"unknown key optimizer\.LR: .*optimizer\.lr"),
        ("~callbacks.reprot", r"removes nothing.*did you mean 'callbacks\.report'"),
        ("+seed=3", "seed exists. Type seed=VALUE without the"),
        ("a b=c", "cannot read 'a b=c'"),
        ("tags=[a", r"cannot read 'tags=\[a'"),
        ("experiment=arith_gpdo", "did you mean 'arith_gdpo'"),
        ("seed=1,2", "--multirun"),
        ("model.rope_tehta=3", r"unknown key model\.rope_tehta: did you mean 'model\.rope_theta'"),
        ("sft.optimizer.weight_deacy=1", r"unknown key sft\.\S+: did you mean 'sft\.optimizer\.weight_decay'"),
        ("rollout.shape={rouds: 3}", r"unknown key rollout\.shape\.rouds: did you mean 'rollout\.shape\.rounds'"),
        ("resume=x/step=25.ckpt", """Type 'resume="x/step=25.ckpt"'"""),
        ("logger=null", "Got NoneType. Type GROUP=NAME"),
        ("priming={style: columns, foo: 1}", r"unknown key priming\.foo: .*valid: priming\.batch_size"),
        ("data.source={seed: 3, sise: 1}", r"unknown key data\.source\.sise: did you mean 'data\.source\.size'"),
    ],
)
def test_mistakes_are_explained(override, said):
    with pytest.raises(ConfigError, match=said) as caught:
        compose("train", ["seed=5", override] if not override.startswith(("seed", "+seed")) else [override])
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["model.rope_theta=5e5", "modle=tiny"], "unknown key modle: did you mean 'model'"),
        (["logger=wandb", "logger.wandb.entity=me"], r"a new key of your own: \+logger\.wandb\.entity=VALUE"),
    ],
)
def test_the_mistake_is_explained_and_not_what_stands_beside_it(line, said):
    with pytest.raises(ConfigError, match=said):
        compose("train", line)


def test_the_search_path_of_the_line_holds_for_the_look_up_of_parameters(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 11\n")
    line = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    cfg = compose("train", [*line, "model.rope_theta=5e5"])
    assert (cfg.seed, cfg.model.rope_theta) == (11, 5e5)
    with pytest.raises(ConfigError, match=r"unknown key model\.rope_tehta: did you mean 'model\.rope_theta'"):
        compose("train", [*line, "model.rope_tehta=5e5"])


def test_a_class_without_a_signature_takes_any_name():
    cfg = without_hydra(compose("train", ["trainer.max_time={_target_: datetime.timedelta, hours: 8}"]))
    check_config(stage_config(cfg, "rl"))
    assert instantiate(cfg.trainer.max_time).total_seconds() == 8 * 3600


def test_the_nearest_key_is_found_beside_other_group_choices():
    with pytest.raises(ConfigError, match=r"did you mean 'model\.kv_lora_rank'"):
        compose("train", ["model=tiny", "model.kv_lora_rnk=3"])


def test_a_users_folder_adds_groups_and_a_wrong_one_is_named(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 11\n")
    assert compose("train", ["experiment=mine"], config_dir=str(tmp_path)).seed == 11
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        compose("train", ["experiment=mne"], config_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="--config-dir"):
        compose("train", [], config_dir=str(tmp_path / "none"))


def test_a_users_primary_config_builds_on_ours(tmp_path):
    (tmp_path / "train.yaml").write_text("defaults: [lit_reason, _self_]\nseed: 12\n")
    (tmp_path / "mine.yaml").write_text("defaults: [lit_reason, _self_]\nseed: 13\n")
    assert compose("mine", [], config_dir=str(tmp_path)).seed == 13


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=os.system",
        "hydra.launcher._target_=subprocess.Popen",
        "hydra.sweeper._target_=os.system",
        "+hydra.job.env_set.LD_PRELOAD=x.so",
        "hydra.job_logging.handlers.console.class=subprocess.Popen",
        "hydra.job_logging.handlers.console.stream=ext://os.environ",
    ],
)
def test_hydras_own_doors_are_closed(override):
    with pytest.raises(UnsafeTargetError):
        compose("train", [override])


def test_a_logging_factory_in_a_users_yaml_is_refused(tmp_path):
    (tmp_path / "debug").mkdir()
    text = "# @package _global_\nhydra: {job_logging: {formatters: {x: {(): os.system, command: id}}}}\n"
    (tmp_path / "debug" / "bad.yaml").write_text(text)
    with pytest.raises(UnsafeTargetError, match=r"job_logging\.formatters\.x\.\(\): os\.system"):
        compose("train", ["debug=bad"], config_dir=str(tmp_path))


def test_a_pickle_cannot_be_rerun():
    with pytest.raises(UnsafeTargetError, match="pickle"):
        parse_argv(["--experimental-rerun", "x.pickle"])


def test_each_swept_value_is_checked_once():
    points = list(sweep_points(["experiment=arith_gdpo", "algorithm=grpo,gpdo", "seed=1,2"]))
    changed = [p[-1] for p in points]
    assert changed == ["algorithm=grpo", "algorithm=gpdo", "seed=1", "seed=2"]
    assert all(p[0] == "experiment=arith_gdpo" for p in points)


def test_composing_needs_no_torch():
    code = "import sys; from lit_reason.config.compose import compose; compose('train'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_eval_and_generate_compose():
    cfg = compose("eval", ["checkpoint=arith-1m.sft", "n=7", "k=2"])
    assert (cfg.evaluation.n, cfg.evaluation.k) == (7, 2)
    cfg = compose("generate", ["checkpoint=x", 'prompt="What is 1 + 2?"'])
    assert cfg.prompt == "What is 1 + 2?" and cfg.rollout.sampling.temperature == 0.0
    with pytest.raises(ConfigError, match="checkpoint=VALUE"):
        check_run(without_hydra(compose("eval")))
