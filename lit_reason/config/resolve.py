"""Interpolations of a config are resolved here and only with resolvers that cannot run code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from lit_reason.errors import ConfigError, UnsafeTargetError, nearest

RESOLVERS = frozenset(
    ["oc.env", "oc.select", "oc.decode", "oc.create", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "hydra", "now"]
)


def to_plain(config: Any) -> Any:
    """`config` as plain dicts, lists and values, every interpolation resolved (objects in plain dicts are kept)."""
    if not OmegaConf.is_config(config):
        if not isinstance(config, dict | list):
            raise ConfigError(f"a config must be a mapping or a list, got {type(config).__name__}")
        config = OmegaConf.create(config, flags={"allow_objects": True})
    check_resolvers(config)
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"the config key '{error.full_key}' cannot be resolved: {message}") from error


def check_resolvers(config: Any) -> None:
    """Refuse `${name:...}` for every name but OmegaConf's and Hydra's own."""
    # A sub-tree's interpolation may point anywhere in its root, so the root is what is searched.
    root = config._get_root()
    for path, text in _strings(OmegaConf.to_container(root, resolve=False), ""):
        for name in resolver_names(text):
            if name not in RESOLVERS:
                raise UnsafeTargetError(
                    f"refused: {path} uses the resolver ${{{name}:...}}, which may run code; "
                    f"{nearest(name, RESOLVERS)}. Write the value itself."
                )


def resolver_names(text: str) -> list[str]:
    """Names of all resolvers in `text`, nested ones too: `"${a}/${oc.env:HOME}"` -> `["oc.env"]`."""
    if "${" not in text:
        return []
    try:
        tree: Any = parse(text)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot read the interpolation in {text!r}: {str(error).splitlines()[0]}") from error
    names, stack = [], [tree]
    while stack:
        node = stack.pop()
        if type(node).__name__ == "InterpolationResolverContext":
            names.append(node.resolverName().getText())
        stack.extend(reversed(getattr(node, "children", None) or []))
    return names


def _strings(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _strings(child, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from _strings(child, f"{path}[{i}]")
    elif isinstance(node, str):
        yield path, node
