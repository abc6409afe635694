"""`lit-reason-train`: pretraining, priming and RL, in the order of `stages`, each in its own folder.

lit-reason-train experiment=arith_gdpo
lit-reason-train experiment=arith_from_scratch seed=2
lit-reason-train -m algorithm=grpo,gdpo seed=1,2,3

run_dir/
  pretrain/  sft/  rl/     a run directory each (checkpoints, metrics, completions)
  <stage>/done.json        written when the stage reached its goal; the same command then goes on with the next one
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lit_reason.cli.launch import launch, print_config
from lit_reason.cli.values import HANDED_IN, check_values
from lit_reason.config import check_config, check_run, stage_config
from lit_reason.config.parameters import with_defaults
from lit_reason.config.resolve import to_plain
from lit_reason.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

DONE = "done.json"
# An interrupted stage may go further than it was told at first, or be evaluated otherwise; a finished one may not.
LENGTH = ("trainer.max_steps", "trainer.max_epochs", "rollout.shape.rounds")
EVALUATION = "evaluation"
# A resumed run may train longer, log elsewhere and use other devices; what decides its numbers must stay.
LOCKED = (
    *("model", "data", "reward", "algorithm", "optimizer", "kernels", "text", "priming", "seed", "init"),
    *("reference", "adapter", "environment"),
    # A run that stopped on too many faults may go on with another limit of them.
    *(f"rubric.{key}" for key in ("_target_", "weights", "scale", "clip", "conditions")),
    *("rollout.sampling", "rollout.shuffle_rewards", "rollout.correction", "rollout.replicas"),
    # Where an engine runs and how long it is waited for may change; what it computes may not.
    *(f"rollout.engine.{key}" for key in ("_target_", "dtype", "max_rows", "speculative", "return_experts")),
    *(f"rollout.engine.{key}" for key in ("settings", "options")),
    *("trainer.precision", "trainer.gradient_clip_val"),
    *(f"rollout.shape.{key}" for key in ("prompts_per_round", "group_size", "epochs", "minibatches", "micro_batches")),
    *(f"rollout.shape.{key}" for key in ("refills", "mask_truncated", "staleness", "in_flight")),
)
# Nodes that are younger than some runs, as those runs used them.
BEFORE = {"environment": {}, "rubric": {"_target_": "lit_reason.rewards.Rubric", "_partial_": True}}


def main() -> None:
    """The console script."""
    launch("train", run, check)


def check(cfg: DictConfig) -> None:
    """Everything that can be known to be wrong before training; the run-level values need no torch."""
    check_run(cfg)
    if _is_hf(cfg) and cfg.init is not None:
        raise ConfigError(f"init={cfg.init}: with model=hf the weights are those of model.name. Type init=null")
    _check_later_stages(cfg)
    parts = {stage: stage_config(cfg, stage) for stage in cfg.stages}
    stage_resume(cfg, cfg.stages[0])
    for look in (check_values, lambda part, stage: check_config(part)):
        for stage, part in parts.items():
            try:
                look(part, stage)
            except ConfigError as error:
                if len(parts) > 1:
                    error.add_note(f"in the stage {stage}; {stage}.KEY=VALUE sets a key for this stage only")
                raise


def _check_later_stages(cfg: DictConfig) -> None:
    for stage in cfg.stages[1:]:
        for key in ("model", "init"):
            if key in (cfg.get(stage) or {}):
                typed = "model.KEY=VALUE" if key == "model" else "init=NAME"
                raise ConfigError(
                    f"{stage}.{key} is set, but {stage} takes the model that the stage before it leaves. "
                    f"Leave it out; type {typed} to set it for the whole run"
                )


def run(cfg: DictConfig) -> Path:
    """Run every stage; each starts from the weights that the one before it left.

    Returns:
        The folder of the last stage's weights, in the zoo's format, or in transformers' for model=hf.
    """
    if cfg.extras.print_config:
        print_config(cfg)
    if cfg.stages[0] == "rl" and cfg.init is None and not _is_hf(cfg):
        log.warning(
            "init=null: RL starts from random weights, whose answers earn no reward, so it learns nothing. "
            "Type init=arith-1m.sft (lit-reason-zoo list), or 'stages=[pretrain,sft,rl]'"
        )
    weights: Path | None = None
    for stage in cfg.stages:
        weights = run_stage(stage_config(cfg, stage), stage, stage_resume(cfg, stage), weights)
    assert weights is not None  # check_run refuses an empty list of stages
    return weights


def _is_hf(tree: Mapping[str, Any]) -> bool:
    """Whether `model` is one of transformers, which has weights of its own."""
    return str((tree.get("model") or {}).get("_target_")).endswith(".HFConfig")


def run_stage(cfg: DictConfig, stage: str, resume: str, weights: Path | None) -> Path:
    """One stage in its own run directory, skipped when it already reached its goal.

    Args:
        cfg: the stage's tree (`stage_config`).
        resume: `"auto"`, `"never"` or a checkpoint of this stage.
        weights: what the stage before it left; None for the first stage, which begins with `cfg.init`.
    """
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities import rank_zero_only

    from lit_reason.checkpoint import RunDir

    cfg.resume = resume
    settings = _settings(cfg)
    with RunDir(cfg.run_dir, locked=LOCKED) as directory:
        directory.start(settings, resume=resume, fill=partial(_filled, cfg))
        done = Done(directory.path / DONE, fill=partial(_filled, cfg))
        if resume == "auto" and (found := done.weights(settings)):
            log.info("stage %s: already done, %s", stage, found)
            return found
        seed_everything(cfg.seed, workers=True, verbose=False)
        log.info("stage %s: %s", stage, directory.path)
        result = stage_functions()[stage](cfg, weights)
        if not cfg.trainer.get("fast_dev_run") and rank_zero_only.rank == 0:
            done.write(result, settings)
    return result


def stage_functions() -> Mapping[str, Callable[[DictConfig, Path | None], Path]]:
    """`{stage: function(stage's tree, weights of the stage before) -> its own weights' folder}`; imports torch."""
    from lit_reason.cli import stages

    return {"pretrain": stages.run_pretrain, "sft": stages.run_sft, "rl": stages.run_rl}


class Done:
    """`done.json`: the settings with which a stage reached its goal, and where its weights are.

    Args:
        fill: adds to saved settings the defaults of parameters that did not exist when they were saved.
    """

    def __init__(self, path: Path, fill: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self.path, self._fill = path, fill

    def write(self, weights: Path, settings: Mapping[str, Any]) -> None:
        from lit_reason.checkpoint.atomic import write_bytes

        record = {"weights": os.path.relpath(weights, self.path.parent), "settings": _decisive(settings)}
        write_bytes(self.path, (json.dumps(record) + "\n").encode())  # a torn one would stop every later start

    def weights(self, settings: Mapping[str, Any]) -> Path | None:
        """The weights of a stage that is done, None when it is not.

        Raises:
            CheckpointError: it was done with other settings. A longer run is no exception: Lightning would resume an
                epoch that has ended, train nothing and exit with 0.
        """
        if not self.path.is_file():
            return None
        record = json.loads(self.path.read_text(encoding="utf-8"))
        now, then = _decisive(settings), _decisive(self._fill(_nested(record["settings"])))
        weights = (self.path.parent / record["weights"]).resolve()
        changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
        if changed:
            found = "; ".join(f"{k}: got {now.get(k)!r}, saved {then.get(k)!r}" for k in changed)
            go_on = f"model.name={weights}" if _is_hf(settings) else f"init=dir:{weights}"
            raise CheckpointError(
                f"{self.path.parent} is done, with other settings: {found}. Type run_name=ANOTHER to begin anew, with "
                f"{go_on} to go on from these weights, or resume=never to set this run aside"
            )
        return weights if weights.is_dir() else None


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The stage's tree as plain values, defaults included, without what may differ from start to start."""
    plain = with_defaults(to_plain(cfg), cfg.allow_targets, HANDED_IN)
    return {key: value for key, value in plain.items() if key != "resume"}


def _filled(cfg: DictConfig, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings with the defaults that they leave out: a parameter that is new since then is no change."""
    return with_defaults(BEFORE | dict(saved), cfg.allow_targets, HANDED_IN, lenient=True)


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings that decide a stage's numbers, how far it goes and how it is evaluated."""
    flat = dict(_flatten(settings))
    prefixes = (*LOCKED, EVALUATION)
    keys = [k for k in flat if k in LENGTH or any(k == p or k.startswith(p + ".") for p in prefixes)]
    return {key: flat[key] for key in sorted(keys)}


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def stage_resume(cfg: DictConfig, stage: str) -> str:
    """`resume` as it concerns one stage: with several stages a path belongs to the one whose folder holds it."""
    resume = str(cfg.resume)
    if resume in ("auto", "never") or len(cfg.stages) == 1:
        return resume
    folders = {name: (Path(cfg.run_dir) / name).resolve() for name in cfg.stages}
    owners = [name for name, folder in folders.items() if Path(resume).resolve().is_relative_to(folder)]
    if not owners:
        raise ConfigError(
            f"resume={resume} lies in no stage of this run ({', '.join(map(str, folders.values()))}). "
            "Type 'stages=[STAGE]' to resume one stage from elsewhere"
        )
    return resume if stage in owners else "auto"


if __name__ == "__main__":
    main()
