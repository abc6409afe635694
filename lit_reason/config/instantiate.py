"""The one function that turns configuration into objects.

It walks the resolved tree itself instead of calling `hydra.utils.instantiate`: what was checked is then exactly what
is called. Every `_target_` in the tree is checked before the first one is called, also those below
`_recursive_: false`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from lit_reason.config.resolve import to_plain
from lit_reason.config.targets import locate
from lit_reason.errors import ConfigError, nearest

DIRECTIVES = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
CONVERSIONS = ("none", "partial", "object", "all")


def instantiate(config: Any, *args: Any, allow_targets: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """Build the object that `config` describes; a mapping or list without `_target_` is built item by item.

    Containers reach constructors as plain dicts and lists whatever `_convert_` says; objects are never OmegaConf's.

    Args:
        config: a DictConfig, ListConfig, dict or list, e.g. `{"_target_": "torch.nn.Linear", "in_features": 2, ...}`.
        args: positional arguments for the outermost target.
        allow_targets: prefixes of the user's own code; None reads the key `allow_targets` at the tree's root.
        kwargs: keyword arguments for the outermost target; they win over the config's.

    Example::

        >>> instantiate({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}).weight.shape
        torch.Size([3, 2])
    """
    if allow_targets is None:
        allow_targets = allowed_prefixes(config)
    plain = to_plain(config)
    found = {path: locate(node["_target_"], allow_targets, path) for path, node in iter_targets(plain)}
    if (args or kwargs) and not (isinstance(plain, dict) and "_target_" in plain):
        raise ConfigError("arguments were given for a config without _target_: there is nothing to hand them to")
    return _build(plain, "", found, args, kwargs)


def allowed_prefixes(config: Any) -> tuple[str, ...]:
    """`allow_targets` at the root of the tree that `config` belongs to."""
    if OmegaConf.is_config(config):
        root = config._get_root()
        return tuple(root.get("allow_targets") or ()) if OmegaConf.is_dict(root) else ()
    return ()


def iter_targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted path, node) of every mapping with a `_target_`, outermost first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, dict(node)
        for key, child in node.items():
            yield from iter_targets(child, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from iter_targets(child, f"{path}[{i}]")


def check_directives(node: Mapping[str, Any], path: str) -> None:
    """Refuse an unknown `_directive_` or one with a value Hydra does not know."""
    where = f"{path}." if path else ""
    for key in node:
        if isinstance(key, str) and key.startswith("_") and key not in DIRECTIVES:
            raise ConfigError(f"unknown key {where}{key}: {nearest(key, DIRECTIVES)}")
    for key in ("_partial_", "_recursive_"):
        if not isinstance(node.get(key, False), bool):
            raise ConfigError(f"{where}{key}={node[key]!r}; valid: true, false")
    if node.get("_convert_", "none") not in CONVERSIONS:
        raise ConfigError(f"{where}_convert_={node['_convert_']!r}: {nearest(str(node['_convert_']), CONVERSIONS)}")
    if not isinstance(node.get("_args_", []), list):
        raise ConfigError(f"{where}_args_={node['_args_']!r}; valid: a list")


def _build(node: Any, path: str, found: Mapping[str, Any], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
    if isinstance(node, list):
        return [_build(child, f"{path}[{i}]", found) for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    build: Callable[[Any, str], Any] = lambda child, at: _build(child, at, found)  # noqa: E731
    if node.get("_recursive_", True) is False:
        build = lambda child, at: child  # noqa: E731
    inner = {k: build(v, f"{path}.{k}" if path else str(k)) for k, v in node.items() if k not in DIRECTIVES}
    if "_target_" not in node:
        return inner
    check_directives(node, path)
    target = found[path]
    positional = tuple(args) or tuple(build(node.get("_args_", []), f"{path}._args_" if path else "_args_"))
    keywords = inner | (kwargs or {})
    if node.get("_partial_", False):
        return functools.partial(target, *positional, **keywords)
    try:
        return target(*positional, **keywords)
    except Exception as error:
        error.add_note(f"while building {node['_target_']} from the config key '{path or '(top)'}'")
        raise
