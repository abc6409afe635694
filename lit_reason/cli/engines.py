"""What generates in a run: the engine, its pushes proven, and the objective that makes up for its rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from lit_reason.cli.build import build
from lit_reason.config.resolve import to_plain
from lit_reason.data import ChatTemplate, Tokenizer
from lit_reason.environments import EnvironmentEngine
from lit_reason.errors import ConfigError
from lit_reason.objectives import Objective
from lit_reason.rollout import Engine, Provable, Replicas
from lit_reason.rollout.hosted import HostedEngine
from lit_reason.sync import ProvenEngine
from lit_reason.types import Prompt

CANARIES = 64  # prompts of which a proof makes its canaries


@contextmanager
def open_engine(
    cfg: DictConfig, tokenizer: Tokenizer, chat: ChatTemplate, prompts: Sequence[Prompt]
) -> Iterator[Engine]:
    """The engine, its pushes proven, its completions in the turns of `environment` if there is one. Whatever it started
    is ended with the block.

    Args:
        prompts: some of which the canaries of the proofs are made.
    """
    engine = _make_engine(cfg, tokenizer)
    used = engine
    try:
        if cfg.rollout.get("proof") is not None:
            if not isinstance(engine, Provable):
                raise ConfigError(
                    f"rollout.proof is set, but a {type(engine).__name__} cannot be asked what it holds "
                    "(lit_reason.rollout.Provable). Type rollout.proof=null"
                )
            texts = [prompt.token_ids for prompt in prompts[:CANARIES]]
            used = ProvenEngine(engine, build(cfg, "rollout.proof", prompts=texts)())
        if cfg.environment:
            used = EnvironmentEngine(used, build(cfg, "environment"), tokenizer, chat)
        yield used
    finally:
        if hasattr(engine, "close"):
            engine.close()  # type: ignore[attr-defined]


def _make_engine(cfg: DictConfig, tokenizer: Tokenizer) -> Engine:
    """One, or `rollout.replicas` of them, among which `rollout.engine.cores` are dealt out."""
    make = build(cfg, "rollout.engine", tokenizer=tokenizer)
    first, count, cores = make(), cfg.rollout.get("replicas", 1), cfg.rollout.engine.get("cores")
    check_replicas(cfg, first)
    if count == 1:
        return first
    return Replicas([make() if cores is None else make(cores=list(cores)[i::count]) for i in range(count)])


def check_replicas(cfg: DictConfig, engine: Any) -> None:
    """ConfigError if there cannot be `rollout.replicas` of this engine."""
    count, cores = cfg.rollout.get("replicas", 1), cfg.rollout.engine.get("cores")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"rollout.replicas={count}: a whole number, at least 1")
    if count > 1 and not isinstance(engine, HostedEngine):
        raise ConfigError(
            f"rollout.replicas={count}: a {type(engine).__name__} is not started in a process by us. Type "
            "rollout=builtin_process or rollout=vllm; of servers, rollout.engine.urls=[URL,URL]"
        )
    if cores is not None and len(cores) < count:
        raise ConfigError(
            f"rollout.replicas={count} on {len(cores)} cores (rollout.engine.cores={list(cores)}): at least one core "
            "for each"
        )


def make_objective(cfg: DictConfig) -> Objective:
    """The algorithm's objective, with the engine's correction unless the algorithm says what it wants itself."""
    correction = cfg.rollout.get("correction")
    if correction is None or "correction" in cfg.algorithm:
        return build(cfg, "algorithm")
    return build(cfg, "algorithm", correction=to_plain(correction))
