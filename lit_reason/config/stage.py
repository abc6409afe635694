"""One tree, several stages: what a stage's own block sets wins over the run's groups."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from lit_reason.errors import ConfigError, nearest

STAGES = ("pretrain", "sft", "rl")


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A copy of the tree as a script sees it, without Hydra's own node."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def stage_config(cfg: DictConfig, stage: str) -> DictConfig:
    """The tree as one stage sees it.

    `cfg.<stage>` is laid over the tree's top level (`sft: {trainer: {max_steps: 200}}` sets `trainer.max_steps`), the
    blocks of all stages are taken out, and `run_dir` becomes `<run_dir>/<stage>`, so that every `${run_dir}` of a
    logger or callback points into the stage's own folder.

    Args:
        cfg: the composed tree (its `hydra` node, if any, is left out).
        stage: `"pretrain"`, `"sft"` or `"rl"`.
    """
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}: {nearest(stage, STAGES)}")
    base = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in (*STAGES, "hydra")])
    block = cfg.get(stage) or {}
    for key in block:
        if key not in base:
            raise ConfigError(f"unknown key {stage}.{key}: {nearest(str(key), [str(k) for k in base])}")
    OmegaConf.set_struct(base, False)
    merged = OmegaConf.merge(base, block)
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"the block {stage} must be a mapping, e.g. {stage}: {{trainer: {{max_steps: 200}}}}")
    with open_dict(merged):
        merged.run_dir = str(Path(cfg.run_dir) / stage)
        merged.stages = [stage]
    OmegaConf.set_struct(merged, True)
    return merged
