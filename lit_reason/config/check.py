"""Everything that can be known to be wrong before training starts.

`check_run` looks at the run-level values and needs no torch; `check_config` imports every `_target_` of the tree and
holds the node's keys and values against the signature.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from omegaconf import DictConfig, OmegaConf

from lit_reason.config.instantiate import DIRECTIVES, allowed_prefixes, check_directives, iter_targets
from lit_reason.config.parameters import parameters, takes_any
from lit_reason.config.resolve import to_plain
from lit_reason.config.stage import STAGES
from lit_reason.config.targets import check_prefixes, locate
from lit_reason.errors import ConfigError, nearest


def check_run(cfg: DictConfig) -> None:
    """Run-level values: stages, resume, run_dir, seed, tags, and that no mandatory value (`???`) is left open."""
    missing = sorted(_missing(OmegaConf.to_container(cfg), ""))
    if missing:
        typed = " ".join(f"{key}=VALUE" for key in missing)
        raise ConfigError(f"no value for {', '.join(missing)}. Type: {typed}")
    check_prefixes(cfg.get("allow_targets") or ())
    if "stages" in cfg:
        _check_stages(cfg.stages)
    if "resume" in cfg:
        _check_resume(str(cfg.resume))
    if "run_dir" in cfg:
        _check_run_dir(Path(cfg.run_dir))
    seed = cfg.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed={seed!r}; valid: a whole number of 0 or more, e.g. seed=1")
    if not OmegaConf.is_list(cfg.get("tags", OmegaConf.create([]))):
        raise ConfigError(f"tags={cfg.tags!r} is no list. Type 'tags=[{cfg.tags}]'")


def _missing(node: Any, path: str) -> Iterator[str]:
    """Keys whose value is `???`; OmegaConf's own search stumbles over interpolations that point at one."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        at = f"{path}.{key}" if path else str(key)
        if child == "???":
            yield at
        else:
            yield from _missing(child, at)


def _check_stages(stages: Any) -> None:
    if not OmegaConf.is_list(stages) or not stages:
        raise ConfigError(f"stages={stages!r}; valid: a list out of {', '.join(STAGES)}. Type 'stages=[sft,rl]'")
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"unknown stage {stage!r} in stages={list(stages)}: {nearest(str(stage), STAGES)}")
    if list(stages) != sorted(set(stages), key=STAGES.index):
        raise ConfigError(f"stages={list(stages)}; each may come once, in the order {', '.join(STAGES)}")


def _check_resume(resume: str) -> None:
    if resume not in ("auto", "never") and not Path(resume).exists():
        raise ConfigError(
            f"resume={resume}: {nearest(resume, ['auto', 'never'])}, or the path of a checkpoint that exists"
        )


def _check_run_dir(path: Path) -> None:
    for folder in (path, *path.parents):
        if folder.is_file():
            raise ConfigError(f"run_dir={path}: {folder} is a file. Type run_name=ANOTHER or run_dir=PATH")


def check_config(
    cfg: Any,
    allow_targets: Sequence[str] | None = None,
    provided: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Check every `_target_` of the tree without building anything.

    Args:
        cfg: the tree (a stage's, as `stage_config` gives it, or any part).
        allow_targets: prefixes of the user's own code; None reads `allow_targets` of the tree.
        provided: `{key of a node: names}` of the required arguments that code hands in, e.g.
            `{"rollout.engine": ["tokenizer"]}`; nodes with `_partial_: true` need none.

    Raises:
        ConfigError: a target does not exist, a key is no parameter of it, a required one is missing, a value is of
            the wrong kind. UnsafeTargetError: a target is not allowed.
    """
    if allow_targets is None:
        allow_targets = allowed_prefixes(cfg)
    for path, node in iter_targets(to_plain(cfg)):
        check_directives(node, path)
        target = locate(node["_target_"], allow_targets, path)
        check_node(path, node, target, (provided or {}).get(path, ()))


def check_node(path: str, node: Mapping[str, Any], target: Any, provided: Collection[str] = ()) -> None:
    """Hold one node's keys and values against its target's signature."""
    where = f"{path}." if path else ""
    by_name = parameters(target)
    open_ended = takes_any(target)
    given = [str(k) for k in node if k not in DIRECTIVES]
    for key in given:
        if key not in by_name and not open_ended:
            raise ConfigError(
                f"unknown key {where}{key} ({node['_target_']} has no such parameter): {nearest(key, by_name)}"
            )
    positional = list(by_name)[: len(node.get("_args_", []))]
    required = [n for n, p in by_name.items() if p.default is p.empty and n not in positional]
    open_keys = [n for n in required if n not in given and n not in provided]
    if open_keys and not node.get("_partial_", False):
        typed = " ".join(f"{where}{key}=VALUE" for key in open_keys)
        raise ConfigError(f"{where}{open_keys[0]} is required by {node['_target_']}. Type: {typed}")
    hints = _hints(target)
    for key in given:
        if key in hints and not accepts(node[key], hints[key]):
            raise ConfigError(f"{where}{key}={node[key]!r} is not valid: {_wanted(str(node[key]), hints[key])}")


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        return {}


def accepts(value: Any, hint: Any) -> bool:
    """Whether a plain value fits an annotation: numbers, bools, text, None, Literal, enums are judged, the rest passes.

    Example::

        >>> accepts("bf16-mixd", Literal["bf16-mixed", "32-true"]), accepts(3, float), accepts("x", Path)
        (False, True, True)
    """
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(accepts(value, part) for part in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        numbers = int if hint is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if hint is str:
        return value is not None and not isinstance(value, dict | list)
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return value in [m.value for m in hint] or value in hint.__members__
    return True


def _wanted(got: str, hint: Any) -> str:
    choices = _choices(hint)
    if choices:
        return nearest(got, choices)
    return f"expected {getattr(hint, '__name__', None) if inspect.isclass(hint) else hint}"


def _choices(hint: Any) -> list[str]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [c for part in typing.get_args(hint) for c in _choices(part)]
    if typing.get_origin(hint) is Literal:
        return [str(v) for v in typing.get_args(hint)]
    return ["null"] if hint is type(None) else []
