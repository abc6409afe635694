"""One function per stage: from a stage's tree to a trained model.

pretrain, sft   data -> LightningModule -> Trainer.fit
rl              prompts -> RolloutLoop(engine, rubric, policy) -> Trainer.fit, evaluated before and after
"""

from __future__ import annotations

import json
import logging
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lit_reason import zoo
from lit_reason.callbacks.progress import generation_line
from lit_reason.callbacks.swapping import Swapping
from lit_reason.checkpoint import SafeCheckpointIO, find_resume
from lit_reason.checkpoint.atomic import write_bytes
from lit_reason.cli.build import build
from lit_reason.cli.engines import make_objective, open_engine
from lit_reason.cli.hf import hf_folder, save_hf_policy, start_hf
from lit_reason.cli.values import HANDED_IN
from lit_reason.config.parameters import with_defaults
from lit_reason.config.resolve import to_plain
from lit_reason.data import PromptCursor, PromptData, Tokenizer, load_tokenizer
from lit_reason.errors import ConfigError, DataError, LitReasonError
from lit_reason.evaluate import EvalReport, compare, evaluate
from lit_reason.loop import RolloutLoop
from lit_reason.models import HFConfig, HFModel, Transformer
from lit_reason.models.adapters import adapters, merged_copy
from lit_reason.models.lora import save_adapters
from lit_reason.modules import LanguageModule, PolicyModule, PretrainModule, Reference, SFTModule, Teacher
from lit_reason.report import write_report
from lit_reason.report.records import STEPS
from lit_reason.rewards import AnswerAnywhere, AnswerExact, Rubric, ShuffledRubric
from lit_reason.rollout import Engine, request_seed

log = logging.getLogger(__name__)

# What decides a model's numbers, for its card; paths and callbacks do not.
RECIPE = (
    *("stages", "init", "seed", "model", "data", "text", "priming", "reward", "rubric", "rollout", "algorithm"),
    *("environment", "reference", "adapter", "optimizer", "kernels", "trainer", "router_bias_rate", "evaluation"),
)

# What an evaluation takes over from `rubric`: all but the transforms, since it reports what the verifiers said.
AS_VERIFIED = ("weights", "max_fault_fraction", "slow_s")

# What records and rollouts need of Lightning's Trainer; a key of the same name under `trainer` wins.
TRAINER = {
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "inference_mode": False,  # lazily built caches of inference tensors would break backward
    "enable_model_summary": False,
}


def start(cfg: DictConfig, weights: Path | None) -> tuple[PromptData, Transformer | HFModel]:
    """The stage's data, and its model: `weights` of the stage before, else `init`, else random weights."""
    data: PromptData = build(cfg, "data")
    name = weights if weights is not None else cfg.init
    config = build(cfg, "model")
    if isinstance(config, HFConfig):
        return data, start_hf(config, data.tokenizer, weights)
    if name is not None:
        model = load_model(name, data.tokenizer)
        if weights is None and model.config != config:
            log.warning("the shape is that of init=%s; what `model` says is not used", name)
        return data, model
    if config.vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.vocab_size} is smaller than the tokenizer's {data.tokenizer.vocab_size}: "
            f"type model.vocab_size={data.tokenizer.vocab_size}"
        )
    return data, Transformer(config)


def load_model(name: str | Path, tokenizer: Tokenizer) -> Transformer:
    """A saved model that was trained with this tokenizer, in float32; DataError for another one."""
    found = zoo.load(name)
    if found.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise DataError(
            f"{name} was trained with the tokenizer {found.tokenizer.fingerprint()[:12]}, data.tokenizer is "
            f"{tokenizer.fingerprint()[:12]}: its token ids mean something else. Type data.tokenizer=NAME of its own"
        )
    return found.model.float()  # bfloat16 weights lose small updates; trainer.precision says what is computed in


def load_checkpoint(name: str | Path) -> tuple[Transformer | HFModel, Tokenizer]:
    """A saved model and its tokenizer: a zoo name, or `dir:PATH` of a zoo folder or of a folder of transformers."""
    if folder := hf_folder(name):
        return HFConfig(str(folder)).build(), load_tokenizer(folder)
    found = zoo.load(name)
    return found.model, found.tokenizer


def finish(
    cfg: DictConfig, trainer: Trainer, model: Transformer | HFModel, data: PromptData, weights: Path | None
) -> Path:
    """Saves the stage's model on one process; the others wait until it is there."""
    if trainer.is_global_zero:
        save_model(cfg, model, data, base=weights or cfg.init or cfg.model.get("name") or "")
    trainer.strategy.barrier("saved")
    return Path(cfg.run_dir) / "model"


def save_model(cfg: DictConfig, model: Transformer | HFModel, data: PromptData, base: str | Path = "") -> Path:
    """The finished stage in `<run_dir>/model`: a zoo folder (weights, card, golden log-probs), or transformers' own."""
    path, summary = Path(cfg.run_dir) / "model", Path(cfg.run_dir) / "summary.json"
    if adapters(model):  # folded in below
        save_adapters(model, Path(cfg.run_dir) / "adapter", base=str(base))
        model = merged_copy(model)
    metrics = card_metrics(json.loads(summary.read_text())) if summary.exists() else {}
    plain = with_defaults(to_plain(cfg), cfg.allow_targets, HANDED_IN)
    recipe: dict[str, Any] = {key: value for key, value in plain.items() if key in RECIPE}
    recipe["trainer"].pop("default_root_dir", None)
    info = {"recipe": OmegaConf.to_yaml(recipe), "seed": cfg.seed, "commit": commit(), "metrics": metrics}
    if isinstance(model, HFModel):
        return save_hf_policy(path, model, data, info)
    return zoo.save(path, model, data.tokenizer, info, overwrite=True)


def card_metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """The card's figures, of a comparison (`..._after`) or of one evaluation."""
    found = {}
    for name, suffix in (("pass_at_1", ""), ("pass_at_1_format_blind", "_format_blind")):
        if f"{name}_after" in summary:
            found[name] = {"value": summary[f"{name}_after"], "ci": summary[f"ci{suffix}_after"], "n": summary["n"]}
        elif name in summary:
            ci = [summary[f"{name}_low"], summary[f"{name}_high"]]
            found[name] = {"value": summary[name], "ci": ci, "n": int(summary["n"])}
    return found


def commit() -> str:
    """The code's commit, with `+changes` when files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parents[2]
    git = partial(subprocess.run, cwd=root, capture_output=True, text=True, check=False)
    try:
        if Path(git(["git", "rev-parse", "--show-toplevel"]).stdout.strip()) != root:
            return "unknown"  # installed somewhere inside another project's repository
    except OSError:  # no git on this machine
        return "unknown"
    head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return (head + "+changes" if changed else head) or "unknown"


def adapt(cfg: DictConfig, model: nn.Module) -> None:
    """Puts the adapters of `adapter` into the model, if any, and says what it did."""
    if cfg.adapter:
        print(f"adapter: {build(cfg, 'adapter').apply(model)}")


def make_reference(cfg: DictConfig, data: PromptData) -> Reference:
    """The stage's reference; a teacher is loaded."""
    reference: Reference = build(cfg, "reference")
    if isinstance(reference, Teacher):
        reference.load(lambda name: load_teacher(name, data.tokenizer))
    return reference


def load_teacher(name: str, tokenizer: Tokenizer) -> nn.Module:
    """A model of the zoo, or `dir:PATH` of a zoo folder or of transformers'; DataError for another tokenizer."""
    folder = hf_folder(name)
    return load_model(name, tokenizer) if folder is None else start_hf(HFConfig(str(folder)), tokenizer, None)


def make_trainer(cfg: DictConfig, **kwargs: Any) -> Trainer:
    """Lightning's Trainer of the stage, with its kernels' callbacks and crash-safe checkpoints."""
    callbacks = [c for group in ("callbacks", "kernels") if cfg[group] for c in build(cfg, group).values()]
    loggers = list((build(cfg, "logger") if cfg.logger else {}).values())
    kwargs |= {"callbacks": callbacks, "logger": loggers or False, "plugins": [SafeCheckpointIO()]}
    defaults = {"default_root_dir": cfg.run_dir} | TRAINER
    trainer = build(cfg, "trainer", **{k: v for k, v in defaults.items() if k not in cfg.trainer}, **kwargs)()
    for callback in callbacks:
        if isinstance(callback, Swapping):  # now, not after an evaluation
            callback.check(trainer.strategy.root_device)
    return trainer


def _fit(cfg: DictConfig, trainer: Trainer, module: LanguageModule, data: Any, checkpoint: Path | None) -> None:
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    goal = 1 if cfg.trainer.get("fast_dev_run") else int(trainer.estimated_stepping_batches)
    if trainer.global_step < goal:  # a run that did not get there must not look like one that did
        raise LitReasonError(f"training ended at step {trainer.global_step} of {goal}; the same command goes on")


def resume_point(cfg: DictConfig) -> Path | None:
    """The checkpoint to go on from; asked first, so that a damaged one is refused before any work."""
    checkpoint = find_resume(cfg.run_dir, cfg.resume)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}")
    return checkpoint


def run_pretrain(cfg: DictConfig, weights: Path | None) -> Path:
    """Next-token training on plain worked problems."""
    checkpoint = resume_point(cfg)
    data, model = start(cfg, weights)
    text = build(cfg, "text")(data=data, seed=cfg.seed)
    trainer = make_trainer(cfg)
    _fit(cfg, trainer, PretrainModule(model, build(cfg, "optimizer"), cfg.router_bias_rate), text, checkpoint)
    return finish(cfg, trainer, model, data, weights)


def run_sft(cfg: DictConfig, weights: Path | None) -> Path:
    """Priming on a few worked solutions in the chat template; the result is evaluated."""
    checkpoint = resume_point(cfg)
    data, model = start(cfg, weights)
    adapt(cfg, model)
    solutions = build(cfg, "priming")(data=data, seed=cfg.seed)
    trainer = make_trainer(cfg)
    _fit(cfg, trainer, SFTModule(model, build(cfg, "optimizer"), cfg.router_bias_rate), solutions, checkpoint)
    if cfg.evaluation.n and trainer.is_global_zero:
        with open_engine(cfg, data.tokenizer, data.chat, data.prompts("all")) as engine:
            report = evaluate_model(cfg, model, data, trainer.strategy.root_device, engine)
        estimate, blind = report.pass_at_1, report.pass_at_1_format_blind
        print(f"held-out problems: pass@1 {estimate}" + (f", format-blind {blind}" if blind else ""))
        write_summary(Path(cfg.run_dir), report.summary())
    return finish(cfg, trainer, model, data, weights)


def run_rl(cfg: DictConfig, weights: Path | None) -> Path:
    """Reinforcement learning with verifiable rewards; writes `summary.json` with the before/after comparison."""
    checkpoint = resume_point(cfg)
    data, model = start(cfg, weights)
    with open_engine(cfg, data.tokenizer, data.chat, data.prompts("all")) as engine:
        return _run_rl(cfg, weights, checkpoint, data, model, engine)


def _run_rl(
    cfg: DictConfig,
    weights: Path | None,
    checkpoint: Path | None,
    data: PromptData,
    model: Transformer | HFModel,
    engine: Engine,
) -> Path:
    objective, shape, sampling = make_objective(cfg), build(cfg, "rollout.shape"), build(cfg, "rollout.sampling")
    rubric = build(cfg, "rubric", rewards=build(cfg, "reward"))()
    if cfg.rollout.shuffle_rewards:
        rubric = ShuffledRubric(rubric)
    check_context(data, model)
    adapt(cfg, model)
    reference = make_reference(cfg, data)
    optimizer = build(cfg, "optimizer")
    policy = PolicyModule(model, optimizer, objective, sampling.temperature, cfg.router_bias_rate, reference)
    trainer = make_trainer(cfg, max_epochs=1, accumulate_grad_batches=shape.micro_batches)

    def on_progress(progress: Any) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "on_generation_progress"):
                callback.on_generation_progress(trainer, policy, progress)

    stages = policy.stages(
        engine,
        sampling,
        rubric.judge,
        updates=shape.updates,
        log_kl=cfg.rollout.log_kl,
        progress=on_progress,
        check=rubric.check,
    )
    loop = RolloutLoop(
        PromptCursor(
            data.train_prompts(), cfg.seed, curriculum=data.curriculum, prompts_per_round=shape.prompts_per_round
        ),
        stages,
        shape,
        request_seed=request_seed,
        seed=cfg.seed,
        max_completion=sampling.max_tokens,
        pad_id=data.tokenizer.pad_id,
        on_round=policy.on_round,
    )
    device = trainer.strategy.root_device
    evaluates = cfg.evaluation.n and trainer.is_global_zero
    before = evaluate_model(cfg, model, data, device, engine) if evaluates else None
    _fit(cfg, trainer, policy, loop, checkpoint)
    if before is not None:
        comparison = compare(before, evaluate_model(cfg, model, data, device, engine))
        rich.print(comparison.table())
        summary = comparison.to_dict() | {
            "seconds": policy.seconds,
            "tokens_per_s": policy.completion_tokens / policy.seconds,
        }
        write_summary(Path(cfg.run_dir), summary)
        if (Path(cfg.run_dir) / STEPS).exists():
            write_report(cfg.run_dir)  # once more, now with the comparison
    return finish(cfg, trainer, model, data, weights)


def check_context(data: PromptData, model: Transformer | HFModel) -> None:
    """Refuses, before anything is generated, a prompt that leaves no room for an answer."""
    longest = max(data.prompts("all"), key=lambda prompt: len(prompt.token_ids))
    tokens, room = len(longest.token_ids), model.config.max_seq_len
    if tokens >= room:
        raise ConfigError(
            f"the longest prompt ({longest.id}) has {tokens} tokens and the model's context is {room} "
            f"(model.max_seq_len): take shorter problems, or a model with a longer context"
        )


def evaluate_model(
    cfg: DictConfig, model: Transformer | HFModel, data: PromptData, device: torch.device, engine: Engine
) -> EvalReport:
    """Verified rewards and the format-blind answer, on held-out problems. Leaves the model on `device`."""
    engine.push(model.to(device), 0)  # Lightning leaves a model on the CPU, before a fit and after it
    rewards = build(cfg, "reward")
    rewards.setdefault("answer", AnswerExact(weight=0.0))
    rewards.setdefault("answer_anywhere", AnswerAnywhere(weight=0.0))
    sampling = build(cfg, "rollout.sampling")
    prompts = data.test_prompts(cfg.evaluation.n)
    print(f"evaluating {len(prompts)} held-out problems")
    return evaluate(
        engine,
        prompts,
        Rubric(rewards, **{key: value for key, value in to_plain(cfg.rubric).items() if key in AS_VERIFIED}),
        sampling=sampling,
        k=cfg.evaluation.k,
        seed=cfg.seed,
        progress=lambda progress: print(generation_line(progress)) if progress.done < progress.total else None,
    )


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_bytes(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
