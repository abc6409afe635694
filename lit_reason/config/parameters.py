"""What a node may hold besides the keys its YAML lists: every parameter of its `_target_`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lit_reason.config.stage import STAGES
from lit_reason.config.targets import locate

PLAIN = (type(None), bool, int, float, str)
# Their defaults are theirs: a record of ours lists what a YAML or a command line sets.
FOREIGN = ("torch.", "lightning.", "transformers.")


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function; `**kwargs` names none."""
    found = inspect.signature(target).parameters.values()
    return {p.name: p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def node_parameters(node: Any, allow_targets: Sequence[str] = ()) -> list[str]:
    """Names of the parameters of a node's `_target_`, none without one or with an interpolated one."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if target is None or "${" in str(target):
        return []
    return list(parameters(locate(target, allow_targets)))


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

        >>> tree = {"model": {"_target_": "lit_reason.models.ModelConfig"}, "sft": {}}
        >>> may_add(tree, "model.rope_theta"), may_add(tree, "sft.model.rope_theta"), may_add(tree, "model.rope")
        (True, True, False)
    """
    node, missing = find(tree, path)
    if missing and missing[0] in node_parameters(node, allow_targets):
        return True
    stage, _, rest = path.partition(".")
    return stage in STAGES and bool(rest) and (not find(tree, rest)[1] or may_add(tree, rest, allow_targets))


def with_defaults(node: Any, allow_targets: Sequence[str] = (), leave_out: Collection[str] = (), path: str = "") -> Any:
    """`node` with every plain default that it leaves to its target, so that a record of it is complete.

    Two trees that build the same objects compare equal, whichever defaults they spell out, and a record still says
    what was used when a later version has another default.

    Args:
        leave_out: dotted keys that code hands in.
    """
    if isinstance(node, list):
        return [with_defaults(child, allow_targets, leave_out, f"{path}[{i}]") for i, child in enumerate(node)]
    if not isinstance(node, dict):
        return node
    at = f"{path}." if path else ""
    filled = {k: with_defaults(v, allow_targets, leave_out, f"{at}{k}") for k, v in node.items()}
    if "_target_" in node and not str(node["_target_"]).startswith(FOREIGN):
        for name, parameter in parameters(locate(node["_target_"], allow_targets, path)).items():
            if f"{at}{name}" not in leave_out and _is_plain(parameter.default):
                value = parameter.default
                filled.setdefault(name, list(value) if isinstance(value, tuple) else value)
    return filled


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, list | tuple) and all(isinstance(v, PLAIN) for v in value))
