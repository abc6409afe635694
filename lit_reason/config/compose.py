"""Compose the tree ahead of Hydra's own main, to say what is wrong in one clean message and before a file is written.

Hydra prints a misspelt key without the valid ones and exits with 1; it would also build what `hydra.callbacks`,
`hydra.launcher` and the logging configs name, without asking. Both are settled here. Needs no torch.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_reason.config.parameters import find, is_open, may_add, node_parameters
from lit_reason.config.stage import STAGES, without_hydra
from lit_reason.errors import ConfigError, UnsafeTargetError, nearest

CONF = "pkg://lit_reason.conf"
# Hydra raises a plain ValueError for a group that is given no name, e.g. trainer=null.
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
# Where keys of earlier versions are now.
MOVED = {"rollout.max_fault_fraction": "rubric.max_fault_fraction"}
LAUNCHERS = ("hydra._internal.core_plugins.", "hydra_plugins.")
LOG_CLASSES = ("logging.", "rich.logging.", "colorlog.")
KEY = re.compile(r"(?:Could not (?:override|delete from config\. The value of|delete from config\.)|at) '([^']+)'")
# What OmegaConf says of a key inside a mapping that the command line gives, e.g. 'rollout.shape={rouds: 3}'.
INNER_KEY = re.compile(r"Key '[^']+' is not in struct\s+full_key: (\S+)")


def parse_argv(argv: Sequence[str]) -> Namespace:
    """Hydra's command line, e.g. `["-m", "seed=1,2"]` -> `.multirun`, `.overrides`, `.config_name`, `.config_dir`."""
    args = get_args_parser().parse_args(list(argv))
    if args.experimental_rerun is not None:
        raise UnsafeTargetError("--experimental-rerun reads a pickle, which can run code. Type the overrides again")
    return args


def compose(
    config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None, multirun: bool = False
) -> DictConfig:
    """The tree with its `hydra` node, or a ConfigError that says what was got, what is valid and what to type.

    Example::

        >>> compose("train", ["experiment=arith_gdpo", "seed=2"]).seed
        2
    """
    overrides = with_additions(config_name, overrides, config_dir)
    try:
        cfg = _load(config_name, overrides, config_dir, multirun)
    except MISTAKES as error:
        raise _explain(error, config_name, list(overrides), config_dir, multirun) from error
    _check_hydra(cfg.hydra)
    return cfg


def with_additions(config_name: str, overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The overrides, with `++` before each that sets a parameter which its node's YAML leaves out.

    Example::

        >>> with_additions("train", ["model.rope_theta=5e5", "model.width=64"])
        ['++model.rope_theta=5e5', 'model.width=64']
    """
    kept = list(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(kept)
        # Keys are looked up in the tree as the choices, additions and deletions make it.
        kept = [str(o.input_line) for o in parsed if not _sets_a_value(o)]
        if len(kept) == len(parsed):
            return list(overrides)
        tree = OmegaConf.to_container(_load(config_name, kept, config_dir, multirun=True))
    except MISTAKES as error:  # not left to the whole line: there, what waits for its `++` would be blamed
        raise _explain(error, config_name, kept, config_dir, multirun=True) from error
    added = []
    for override in parsed:
        new, unknown = _new_keys(tree, override) if _sets_a_value(override) else ([], [])
        if new and unknown:
            raise _unknown_key(unknown[0], "", config_name, kept, config_dir)
        added.append(f"++{override.input_line}" if new else str(override.input_line))
    return added


def _sets_a_value(override: Override) -> bool:
    """Whether it changes a value below the root, rather than a choice, a run-level value or which keys there are."""
    changes = not (override.is_delete() or override.is_add() or override.is_force_add())
    key = override.key_or_group
    if not changes or key.endswith("_target_") or key.split(".")[0] == "hydra":
        return False
    return "." in key or isinstance(_value(override), dict)


def _new_keys(tree: Any, override: Override) -> tuple[list[str], list[str]]:
    """Of the keys that it sets and the tree does not hold: those that may be added, and those that may not."""
    new, unknown = [], []
    for path in _leaves(_value(override), override.key_or_group):
        node, missing = find(tree, path)
        if missing and may_add(tree, path, tree.get("allow_targets") or ()):
            new.append(path)
        elif missing and isinstance(node, Mapping):  # in place of a plain value Hydra takes a mapping as it is
            unknown.append(path)
    return new, unknown


def _value(override: Override) -> Any:
    return None if override.is_sweep_override() else override.value()


def _leaves(value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, Mapping) or not value:
        yield path
        return
    for key, child in value.items():
        yield from _leaves(child, f"{path}.{key}")


def sweep_points(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Each swept value once, the other sweeps left at their base: enough to find a misspelt value before job 1 runs."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plain = [o.input_line or "" for o in parsed if not o.is_sweep_override()]
    for override in parsed:
        if override.is_choice_sweep():
            for value in override.sweep_string_iterator():
                yield [*plain, f"{override.get_key_element()}={value}"]


def _loader(config_dir: str | None) -> ConfigLoaderImpl:
    search_path = create_config_search_path(CONF)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir {config_dir} is no folder. Type the folder that holds your YAML groups")
        search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}", anchor="schema")
    return ConfigLoaderImpl(config_search_path=search_path)


def _load(name: str, overrides: Sequence[str], config_dir: str | None, multirun: bool) -> DictConfig:
    loader = _loader(config_dir)
    # The loader reads the job's name from Hydra's singletons; they are put back as hydra.main expects them.
    state = Singleton.get_state()
    try:
        setup_globals()
        JobRuntime.instance().set("name", name)
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        return loader.load_configuration(name, list(overrides), run_mode=mode, from_shell=True)
    finally:
        Singleton.set_state(state)


def _explain(error: Exception, name: str, overrides: list[str], config_dir: str | None, multirun: bool) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None and str(e))
    if isinstance(error, MissingConfigException):
        return _missing_option(error, text, name, config_dir)
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        typed = "key=value; quote values with spaces, brackets or commas: 'key=[a,b]' or 'key=\"a b\"'"
        if "=" in value and not re.search(r"[\"'\[{(]", value):  # a checkpoint's path, e.g. .../step=25.ckpt
            typed = f"'{key}=\"{value}\"'"
        return ConfigError(f"cannot read {error.override!r}: {text.splitlines()[0]}. Type {typed}")
    found, inner = KEY.search(text), INNER_KEY.search(text)
    if found:
        key = inner[1] if inner and inner[1].startswith(f"{found[1]}.") else found[1]
        return _unknown_key(key, text, name, overrides, config_dir)
    if "requires --multirun" in text:
        return ConfigError(f"{text.splitlines()[0]}: to run every value type -m before the overrides")
    said = re.sub(r"\s*(full_key|object_type|reference_type):? ?=?\s*\S+", "", text)
    typed = ". Type GROUP=NAME, e.g. logger=none" if "Config group override must" in text else ""
    return ConfigError(f"the configuration does not compose: {' '.join(said.split())}{typed}")


def _missing_option(error: MissingConfigException, text: str, name: str, config_dir: str | None) -> ConfigError:
    group, _, got = str(error.missing_cfg_file or "").rpartition("/")
    options = _loader(config_dir).get_group_options(group, ObjectType.CONFIG) if group else error.options
    if group and options:
        return ConfigError(f"unknown option {group}={got}: {nearest(got, options)}. Type {group}=NAME")
    override = re.search(r"Could not override '([^'@]+)", text)
    if override:
        return _unknown_key(override[1], text, name, [], config_dir)
    return ConfigError(" ".join(text.split()))


def _unknown_key(key: str, text: str, name: str, overrides: list[str], config_dir: str | None) -> ConfigError:
    if "An item is already at" in text:
        return ConfigError(f"+{key} adds a key, but {key} exists. Type {key}=VALUE without the +")
    stage, _, rest = key.partition(".")
    block, old = (f"{stage}.", rest) if stage in STAGES else ("", key)
    if old in MOVED:
        return ConfigError(f"{key} has moved. Type {block}{MOVED[old]}=VALUE")
    tree, groups = _known(key, name, overrides, config_dir)
    removal = "delete" in text
    head, node = _parent(tree, key, of_block=removal)
    names = [str(k) for k in node if not str(k).startswith("_")]
    if not removal:
        names += node_parameters(node, tree.get("allow_targets") or ())
    beside = [f"{head}.{n}" for n in dict.fromkeys(names)] or list(dict.fromkeys([*_keys(tree, ""), *groups]))
    hint = nearest(key, beside)
    if len(beside) > 70:
        hint = nearest(key, [k for k in beside if "." not in k])
    if removal:
        return ConfigError(f"~{key} removes nothing, there is no such key: {hint}")
    own = "" if not is_open(node, tree.get("allow_targets") or ()) else f" (a new key of your own: +{key}=VALUE)"
    return ConfigError(
        f"unknown key {key}: {hint}. Type one of these as key=value{own}; 'lit-reason-{name} --cfg job' prints the tree"
    )


def _parent(tree: Any, key: str, of_block: bool) -> tuple[str, Mapping[str, Any]]:
    """The name and the node that a key stands under; an empty node when there is none but the root.

    A stage's block is laid over the tree, so `sft.model.x` stands under `model`, unless the block itself is meant.
    """
    head = key.rpartition(".")[0]
    stage, _, rest = head.partition(".")
    node, missing = find(tree, rest if stage in STAGES and rest and not of_block else head)
    return head, node if isinstance(node, Mapping) and not missing else {}


def _known(bad: str, name: str, overrides: list[str], config_dir: str | None) -> tuple[Any, list[str]]:
    """The tree and its groups, composed without the bad override and, if that fails, without any."""
    kept = [o for o in overrides if o.lstrip("+~").split("=")[0].split("@")[0] != bad]
    kept = [o for o in kept if "hydra" not in o or o.startswith("hydra.searchpath=")]
    for attempt in (kept, []):
        try:
            cfg = _load(name, attempt, config_dir, multirun=True)
        except MISTAKES:
            continue
        groups = [g for g in cfg.hydra.runtime.choices if not g.startswith("hydra")]
        return OmegaConf.to_container(without_hydra(cfg)), groups
    return {}, []


def _keys(node: Any, path: str) -> Iterator[str]:
    for key, child in node.items() if isinstance(node, dict) else ():
        if not str(key).startswith("_"):
            at = f"{path}.{key}" if path else str(key)
            yield at
            yield from _keys(child, at)


def _check_hydra(hydra: DictConfig) -> None:
    """Hydra builds what these nodes name before our code runs: refuse all but its own."""
    if hydra.get("callbacks"):
        raise UnsafeTargetError(
            "refused: hydra.callbacks names code that Hydra runs unchecked; use `callbacks` instead"
        )
    for node in ("launcher", "sweeper"):
        target = str(hydra[node].get("_target_"))
        if not target.startswith(LAUNCHERS):
            raise UnsafeTargetError(f"refused: hydra.{node}._target_: {target}; valid: Hydra's own plugins")
    for name in hydra.job.get("env_set") or {}:
        if str(name).startswith(("LD_", "PYTHON", "PATH")):
            raise UnsafeTargetError(f"refused: hydra.job.env_set.{name} changes which code runs; set it in your shell")
    for node in ("job_logging", "hydra_logging"):
        _check_logging(OmegaConf.to_container(hydra[node] or OmegaConf.create({})), f"hydra.{node}")


def _check_logging(node: Any, path: str) -> None:
    """`logging.config.dictConfig` calls what stands under `()` and `class` and follows `ext://`."""
    if isinstance(node, str) and node.startswith("ext://") and node not in ("ext://sys.stdout", "ext://sys.stderr"):
        raise UnsafeTargetError(f"refused: {path}: {node}")
    for key, child in node.items() if isinstance(node, dict) else ():
        if key in ("()", "class", ".") and not str(child).startswith(LOG_CLASSES):
            raise UnsafeTargetError(f"refused: {path}.{key}: {child}; valid: classes of the logging module")
        _check_logging(child, f"{path}.{key}")
    for i, child in enumerate(node) if isinstance(node, list) else ():
        _check_logging(child, f"{path}[{i}]")
