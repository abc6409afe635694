"""What a node may hold besides the keys its YAML lists: every parameter of its `_target_`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lit_reason.config.stage import STAGES
from lit_reason.config.targets import locate
from lit_reason.errors import ConfigError, UnsafeTargetError

PLAIN = (type(None), bool, int, float, str)
# Their defaults are theirs: a record of ours lists what a YAML or a command line sets.
FOREIGN = ("torch.", "lightning.", "transformers.")


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function; `**kwargs` names none, nor does a class written in C."""
    found = _signature(target) or []
    return {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def takes_any(target: Any) -> bool:
    """Whether every name may be handed in: there is a `**kwargs`, or nobody can tell (`datetime.timedelta`)."""
    found = _signature(target)
    return found is None or any(p.kind is p.VAR_KEYWORD for p in found)


def _signature(target: Any) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(target).parameters.values())
    except ValueError:  # a builtin that states none
        return None


def node_parameters(node: Any, allow_targets: Sequence[str] = ()) -> list[str]:
    """Names of the parameters of a node's `_target_`, none without one or with an interpolated one."""
    target = _node_target(node, allow_targets)
    return [] if target is None else list(parameters(target))


def is_open(node: Any, allow_targets: Sequence[str] = ()) -> bool:
    """Whether a node may hold keys that nothing names: it has no `_target_`, or one that takes any."""
    target = _node_target(node, allow_targets)
    return target is None or takes_any(target)


def _node_target(node: Any, allow_targets: Sequence[str]) -> Any:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return None if target is None or "${" in str(target) else locate(target, allow_targets)


def find(tree: Any, path: str) -> tuple[Any, list[str]]:
    """The deepest node on the way of a dotted path, and the parts of the path that are not there."""
    node, parts = tree, path.split(".")
    while parts and isinstance(node, Mapping) and parts[0] in node:
        node, parts = node[parts[0]], parts[1:]
    return node, parts


def may_add(tree: Any, path: str, allow_targets: Sequence[str] = ()) -> bool:
    """Whether a path that the tree does not hold leads to a parameter of one of its nodes, or below one.

    A stage's block is laid over the tree, so it may hold whatever the tree may.

    Example::

        >>> tree = {"optimizer": {"_target_": "lit_reason.optim.AdamW"}, "sft": {}}
        >>> may_add(tree, "optimizer.betas"), may_add(tree, "sft.optimizer.betas"), may_add(tree, "optimizer.beta")
        (True, True, False)
    """
    node, missing = find(tree, path)
    if missing and missing[0] in node_parameters(node, allow_targets):
        return True
    stage, _, rest = path.partition(".")
    return stage in STAGES and bool(rest) and (not find(tree, rest)[1] or may_add(tree, rest, allow_targets))


def with_defaults(
    node: Any,
    allow_targets: Sequence[str] = (),
    leave_out: Collection[str] = (),
    path: str = "",
    lenient: bool = False,
) -> Any:
    """`node` with every plain default that it leaves to its target, so that a record of it is complete.

    Two trees that build the same objects compare equal, whichever defaults they spell out, and a record still says
    what was used when a later version has another default.

    Args:
        leave_out: dotted keys that code hands in.
        lenient: leave a node as it is whose target no longer exists, as in an old record.
    """
    if isinstance(node, list):
        return [with_defaults(v, allow_targets, leave_out, f"{path}[{i}]", lenient) for i, v in enumerate(node)]
    if not isinstance(node, dict):
        return node
    at = f"{path}." if path else ""
    filled = {k: with_defaults(v, allow_targets, leave_out, f"{at}{k}", lenient) for k, v in node.items()}
    if "_target_" in node and not str(node["_target_"]).startswith(FOREIGN):
        try:
            target = locate(node["_target_"], allow_targets, path)
        except (ConfigError, UnsafeTargetError, ImportError):
            if lenient:
                return filled
            raise
        for name, parameter in parameters(target).items():
            if f"{at}{name}" not in leave_out and _is_plain(parameter.default):
                value = parameter.default
                filled.setdefault(name, list(value) if isinstance(value, tuple) else value)
    return filled


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, list | tuple) and all(isinstance(v, PLAIN) for v in value))
