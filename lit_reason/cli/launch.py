"""What the Hydra scripts share: compose and check first, then hand over to Hydra, and turn our errors into one message.

    argv -> compose -> check (exit code 2 and one message, nothing written) -> hydra.main -> task(cfg)

Exit codes: 0 done; 2 the configuration cannot be run; 130 interrupted; 1 anything else that went wrong.
`HYDRA_FULL_ERROR=1` shows the traceback of every error.
"""

from __future__ import annotations

import functools
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lit_reason.config.compose import CONF, compose, parse_argv, sweep_points, with_additions
from lit_reason.config.stage import without_hydra
from lit_reason.errors import ConfigError, LitReasonError, UnsafeTargetError, nearest

if TYPE_CHECKING:
    import torch

Task = Callable[[DictConfig], Any]
BEFORE_START = (ConfigError, UnsafeTargetError)
DEVICES = ("auto", "cpu", "cuda")


def launch(config_name: str, task: Task, check: Task) -> None:
    """Run a console script.

    Args:
        config_name: `"train"`, `"eval"` or `"generate"`: the primary YAML, unless `--config-name` names another.
        task: what to do with one composed tree.
        check: raises what is wrong with a tree; called before anything is written, and again for each job of a sweep.
    """
    with clean_errors():
        args = parse_argv(sys.argv[1:])
        if not (args.help or args.hydra_help or args.info):
            added = with_additions(args.config_name or config_name, args.overrides, args.config_dir)
            # Hydra's main reads the command line by itself, here and in every process that Lightning starts.
            changed = dict(zip(args.overrides, added, strict=True))
            sys.argv[1:] = [changed.get(text, text) for text in sys.argv[1:]]
            args.overrides = added
            preflight(args.config_name or config_name, args, check)

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        with clean_errors():
            cfg = job_config(cfg)
            check(cfg)
            apply_extras(cfg.extras)
            return task(cfg)

    hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")(job)()


def preflight(config_name: str, args: Namespace, check: Task) -> None:
    """Compose what Hydra is about to compose, and check it; of a sweep, the base and each swept value once."""
    cfg = compose(config_name, args.overrides, args.config_dir, args.multirun)
    points: list[Sequence[str]] = [args.overrides]
    if args.multirun or (cfg.hydra.mode is not None and cfg.hydra.mode.name == "MULTIRUN"):
        points = list(sweep_points(args.overrides)) or [args.overrides]
        _check_sweeper(cfg, config_name, args)
    if args.cfg:
        return
    for point in points:
        check(without_hydra(compose(config_name, point, args.config_dir, args.multirun)))


def _check_sweeper(cfg: DictConfig, config_name: str, args: Namespace) -> None:
    """A YAML's own sweep goes to Hydra as it stands, so a parameter that no YAML lists needs its `++` there."""
    params = cfg.hydra.sweeper.get("params") or {}
    lines = [f"{key}={value}" for key, value in params.items()]
    added = with_additions(config_name, [*args.overrides, *lines], args.config_dir)[len(args.overrides) :]
    missing = [str(key) for key, line, new in zip(params, lines, added, strict=True) if line != new]
    if missing:
        typed = ", ".join(f"'++{key}': VALUES" for key in missing)
        raise ConfigError(
            f"hydra.sweeper.params sweeps {', '.join(missing)}, which no YAML of the tree lists. Write {typed} there"
        )


def job_config(cfg: DictConfig) -> DictConfig:
    """The tree with `run_dir` as Hydra made it: in a sweep every job has its own."""
    output = HydraConfig.get().runtime.output_dir
    with open_dict(cfg):
        cfg.run_dir = output
    return cfg


def apply_extras(extras: DictConfig) -> None:
    """`extras.threads` and `extras.matmul_precision`."""
    import torch

    if extras.threads is not None:
        torch.set_num_threads(extras.threads)
    torch.set_float32_matmul_precision(extras.matmul_precision)


def print_config(cfg: DictConfig) -> None:
    """The tree as YAML, interpolations resolved."""
    print(OmegaConf.to_yaml(without_hydra(cfg), resolve=True))


class clean_errors:
    """A LitReasonError or Ctrl-C becomes its message on stderr and an exit code; every other error passes."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            return
        if isinstance(error, KeyboardInterrupt):
            print(
                "interrupted (a training run goes on from its last checkpoint with the same command)", file=sys.stderr
            )
            sys.exit(130)
        if not isinstance(error, LitReasonError):
            return
        notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()))
        print(f"{type(error).__name__}: {error}{notes}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BEFORE_START) else 1)


def check_count(cfg: DictConfig, key: str, least: int) -> None:
    """Refuse a count that is no whole number or too small."""
    got = OmegaConf.select(cfg, key)
    if not isinstance(got, int) or isinstance(got, bool) or got < least:
        raise ConfigError(f"{key}={got!r}; valid: a whole number of {least} or more, e.g. {key}=4")


def check_device(cfg: DictConfig) -> None:
    """Refuse a `device` that is unknown or not there."""
    if cfg.device not in DEVICES:
        raise ConfigError(f"device={cfg.device}: {nearest(str(cfg.device), DEVICES)}")
    if cfg.device == "cuda" and pick_device("auto").type != "cuda":
        raise ConfigError("device=cuda: torch finds no CUDA device here. Type device=auto, or device=cpu")


def pick_device(name: str) -> torch.device:
    """`"auto"` is `cuda` where there is one, else `cpu`."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
