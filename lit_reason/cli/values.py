"""Values that a stage's own objects refuse, found before the run's first stage trains.

The rules stand in the constructors. What takes plain values is built here once per stage and thrown away; what may load
or start something is not: data, engines, loggers, callbacks, a user's own rewards.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_reason.cli.build import checked_build
from lit_reason.cli.launch import check_count
from lit_reason.config.compose import MOVED
from lit_reason.config.resolve import to_plain
from lit_reason.errors import ConfigError, ZooError, nearest

# Arguments that the run hands in itself, and what sets each. A key of that name would be overwritten in silence.
HANDED_IN = {
    "text.data": "data=NAME",
    "text.seed": "seed=VALUE",
    "priming.data": "data=NAME",
    "priming.seed": "seed=VALUE",
    "rollout.engine.tokenizer": "data.tokenizer=NAME",
    "rollout.proof.prompts": "",
    "rubric.rewards": "'reward=[NAME,...]'",
    "trainer.callbacks": "'callbacks=[NAME,...]'",
    "trainer.logger": "logger=NAME",
    "trainer.plugins": "",
}
HANDED_IN_RL = {
    "trainer.max_epochs": "rollout.shape.rounds=VALUE",
    "trainer.accumulate_grad_batches": "rollout.shape.micro_batches=VALUE",
}


def check_values(cfg: DictConfig, stage: str) -> None:
    """Build a stage's cheap objects, those first that need no Lightning, whose import takes seconds.

    Args:
        cfg: the stage's tree (`stage_config`).
        stage: `"pretrain"`, `"sft"` or `"rl"`.

    Raises:
        ConfigError: what one of them, or a rule between two of them, refuses.
    """
    for key, typed in (HANDED_IN | HANDED_IN_RL if stage == "rl" else HANDED_IN).items():
        if OmegaConf.select(cfg, key) is not None:
            instead = f". Type {typed}" if typed else ""
            raise ConfigError(f"{key} is set by the run itself; leave it out{instead}")
    for key, now in MOVED.items():
        if OmegaConf.select(cfg, key) is not None:
            raise ConfigError(f"{key} has moved. Type {now}=VALUE")
    _check_number(cfg, "router_bias_rate", example=0.001)
    if stage != "pretrain":
        _check_evaluation(cfg)
    if stage != "rl":
        _check_supervised(cfg, "text" if stage == "pretrain" else "priming")
    _check_accelerator(cfg.trainer)
    steps = _check_rl(cfg) if stage == "rl" else _check_length(cfg.trainer)
    checked_build(cfg, "model")
    _check_schedule(checked_build(cfg, "optimizer"), 1 if cfg.trainer.get("fast_dev_run") else steps)
    if stage == "rl" and not (sampling := checked_build(cfg, "rollout.sampling")).temperature > 0:
        raise ConfigError(  # PolicyModule says so too, but it takes a model
            f"rollout.sampling.temperature={sampling.temperature}: RL needs samples that differ (0 is greedy). "
            "Type rollout.sampling.temperature=1.0"
        )
    if stage != "pretrain":
        _check_rewards(cfg)
        _check_engine(cfg)
        _check_environment(cfg)
        if cfg.adapter:
            checked_build(cfg, "adapter")
    if stage == "rl":
        _check_reference(cfg)


def _check_number(cfg: DictConfig, key: str, example: float, most: float = math.inf) -> None:
    got = OmegaConf.select(cfg, key)
    if not isinstance(got, int | float) or isinstance(got, bool) or not (0 <= got <= most and math.isfinite(got)):
        valid = "0 or more" if most == math.inf else f"from 0 to {most}"
        raise ConfigError(f"{key}={got!r}; valid: a number {valid}, e.g. {key}={example}")


def _check_evaluation(cfg: DictConfig) -> None:
    for key in ("evaluation.n", "evaluation.k"):
        check_count(cfg, key, least=0)


def _check_supervised(cfg: DictConfig, key: str) -> None:
    """What `text` or `priming` would refuse once its data are read; what it leaves out is right."""
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"{key}={node!r}; valid: a node with a _target_, as in conf/lit_reason.yaml. Leave {key} out")
    if not str(node.get("_target_")).startswith("lit_reason.data."):
        return

    from lit_reason.data.solvers import STYLES

    counts = {"seq_len": 2 if key == "text" else 1, "batch_size": 1, "n_examples": 1, "terse_min_lines": 1}
    for name, least in counts.items():
        if name in node and not (name == "n_examples" and node[name] is None):
            check_count(cfg, f"{key}.{name}", least)
    for name in ("bare_fraction", "facts_fraction", "terse_fraction"):
        if name in node:
            _check_number(cfg, f"{key}.{name}", example=0.2, most=1)
    if node.get("style", "steps") not in STYLES:
        raise ConfigError(f"{key}.style={node.style!r}: {nearest(str(node.style), STYLES)}. Type {key}.style=NAME")


def _check_accelerator(trainer: DictConfig) -> None:
    import torch

    there = {"cuda": torch.cuda.is_available()}
    there["gpu"] = there["cuda"] or torch.backends.mps.is_available()
    if not there.get(name := trainer.get("accelerator"), True):
        raise ConfigError(f"trainer.accelerator={name}: torch finds no such device here. Type trainer=cpu")


def _check_length(trainer: DictConfig) -> int:
    steps = trainer.get("max_steps", -1)
    if not (isinstance(steps, int) and steps >= 1) and not trainer.get("fast_dev_run"):
        raise ConfigError(
            f"trainer.max_steps={steps}: a supervised stage needs a length, 1 or more. Type trainer.max_steps=500"
        )
    return steps


def _check_rl(cfg: DictConfig) -> int:
    """Optimizer steps of the run."""
    objective, shape = checked_build(cfg, "algorithm"), checked_build(cfg, "rollout.shape")
    _check_processes(cfg.trainer, shape)

    from lit_reason.objectives import check_group_size

    if (curriculum := OmegaConf.select(cfg, "data.curriculum")) is not None:
        from lit_reason.data.curriculum import check_curriculum

        check_curriculum(checked_build(cfg, "data.curriculum") if OmegaConf.is_dict(curriculum) else curriculum)
    check_group_size(objective, shape.group_size, key="rollout.shape.group_size")
    if shape.updates > 1 and not objective.has_ratio:
        raise ConfigError(
            f"algorithm.clip=reinforce has no ratio, so a round allows one update, and rollout.shape makes "
            f"{shape.updates} of it. Type rollout.shape.epochs=1 rollout.shape.minibatches=1, or algorithm.clip=none"
        )
    if shape.refills and not objective.compares:
        raise ConfigError(
            f"rollout.shape.refills={shape.refills}: the advantage {objective.advantage_name!r} does not compare the "
            "completions of a prompt, so none of its groups is without a signal. Type rollout.shape.refills=0"
        )
    _check_adapter(cfg, objective)
    steps, most = shape.rounds * shape.updates, cfg.trainer.get("max_steps")
    return min(steps, most) if isinstance(most, int) and most > 0 else steps


def _check_processes(trainer: Any, shape: Any) -> None:
    """As the loop does in its first round; what "auto" comes to is known only there."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    count = len(devices) if OmegaConf.is_list(devices) else devices
    if isinstance(count, int) and isinstance(nodes, int) and count > 0:
        shape.check_ranks(count * nodes)


def _check_adapter(cfg: DictConfig, objective: Any) -> None:
    """What adapters do not go with in RL; the objects say so too, but they take a model."""
    if not cfg.adapter:
        return
    if checked_build(cfg, "adapter").dropout:
        raise ConfigError(
            "adapter.dropout: RL compares the policy with itself, and with dropout old, new and engine are three "
            "networks. Type adapter.dropout=0"
        )
    if objective.critic is not None and objective.critic.trunk == "separate":
        raise ConfigError(
            "algorithm.critic.trunk=separate with an adapter: a copy of a frozen policy could not learn. "
            "Type algorithm.critic.trunk=shared"
        )
    if str(cfg.reference.get("_target_")) in ("lit_reason.modules.EMA", "lit_reason.modules.Refreshed"):
        raise ConfigError(
            f"reference={cfg.reference._target_.split('.')[-1].lower()} with an adapter: the policy is its own frozen "
            "reference, with the adapters off. Type reference=frozen, or adapter=none"
        )
    if cfg.router_bias_rate:
        raise ConfigError("rl.router_bias_rate with an adapter would move its reference. Type rl.router_bias_rate=0")


def _check_reference(cfg: DictConfig) -> None:
    """Last, because it imports Lightning."""
    from lit_reason import zoo
    from lit_reason.cli.hf import hf_folder
    from lit_reason.modules import Teacher
    from lit_reason.modules.policy import check_teacher

    reference = checked_build(cfg, "reference")
    check_teacher(checked_build(cfg, "algorithm"), reference)
    if isinstance(reference, Teacher) and hf_folder(reference.name) is None:
        folder = Path(reference.name.removeprefix("dir:"))
        if reference.name.startswith("dir:") and not folder.is_dir():
            raise ConfigError(f"reference.name={reference.name}: there is no folder {folder}")
        try:
            zoo.info(reference.name)
        except ZooError as error:
            raise ConfigError(f"reference.name={reference.name}: {error}") from error


def _check_schedule(optimizer: Any, steps: int) -> None:
    from lit_reason.optim import Recipe
    from lit_reason.optim.schedules import schedule

    if isinstance(optimizer, Recipe):
        schedule(optimizer.schedule, warmup_steps=optimizer.warmup_steps, total_steps=steps, final_fraction=0.0)


def _check_rewards(cfg: DictConfig) -> None:
    nodes = cfg.get("reward") or OmegaConf.create()
    for name in map(str, nodes):
        if not OmegaConf.is_dict(nodes[name]):
            raise ConfigError(f"reward.{name}={nodes[name]!r} is no reward. To leave it out type '~reward.{name}'")
    ours = [str(name) for name in nodes if str(OmegaConf.select(nodes, f"{name}._target_")).startswith("lit_reason.")]
    rewards = {name: checked_build(cfg, f"reward.{name}") for name in ours}

    from lit_reason.rewards import Length, Rubric

    # A stand-in takes the name of a user's own reward, which may be costly to build.
    columns = {str(name): rewards.get(str(name), Length(max_tokens=1)) for name in nodes}
    rubric = checked_build(cfg, "rubric")
    if getattr(rubric, "func", None) is Rubric:
        rubric(columns)


def _check_environment(cfg: DictConfig) -> None:
    """Our tools start nothing before they are called; an environment of another library is loaded late."""
    target = str(cfg.environment.get("_target_"))
    if target == "lit_reason.environments.Tools":
        checked_build(cfg, "environment")
    if target == "lit_reason.environments.Verifiers":
        from lit_reason.environments.hosted import library

        library()


def _check_engine(cfg: DictConfig) -> None:
    """Our engines keep the tokenizer and look at plain values; another one may start something."""
    if not str(OmegaConf.select(cfg, "rollout.engine._target_")).startswith("lit_reason.rollout."):
        return

    from lit_reason.cli.engines import check_replicas
    from lit_reason.objectives.correction import resolve_correction
    from lit_reason.rollout import BuiltinEngine

    engine = checked_build(cfg, "rollout.engine")(tokenizer=None)
    check_replicas(cfg, engine)
    if hasattr(engine, "check_sampling"):
        engine.check_sampling(checked_build(cfg, "rollout.sampling"))
    if cfg.rollout.get("proof") is not None:
        checked_build(cfg, "rollout.proof")(prompts=[[0]])
    if cfg.rollout.get("correction") is not None:
        try:
            resolve_correction(to_plain(cfg.rollout.correction))
        except ConfigError as error:
            raise ConfigError(str(error).replace("algorithm.correction", "rollout.correction")) from error
    drafts = isinstance(engine, BuiltinEngine) and engine.speculative
    if drafts and cfg.init is None and not OmegaConf.select(cfg, "model.mtp_depth"):
        raise ConfigError(
            "rollout.engine.speculative=true: the model has no multi-token-prediction module that could draft. "
            "Type model.mtp_depth=1, or leave rollout.engine.speculative out"
        )
