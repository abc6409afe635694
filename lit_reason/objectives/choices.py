"""From the plain values of a YAML or a command line to one function per axis.

Each axis keeps one small table, name -> function. An axis' settings are the function's keyword-only parameters, so a
new choice is one function and one line of its table; nothing else knows the names.

Example::

    >>> clip = resolve("clip", {"name": "ppo", "low": 0.2, "high": 0.28, "dual": None}, CLIPS)
    >>> ratio = resolve("ratio", "token", RATIOS)
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_reason.errors import ConfigError, nearest


def resolve(axis: str, spec: str | Mapping[str, Any], table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The axis' function with its settings bound.

    Args:
        axis: the axis' name in the configuration, e.g. `"clip"`; used in messages only.
        spec: a name, or a mapping with `name` and the function's settings.
        table: what the axis offers.

    Raises:
        ConfigError: an unknown name, an unknown or missing setting, or a value of the wrong kind.
    """
    name, settings = _split(axis, spec, table)
    function = table[name]
    wanted = settings_of(function)
    unknown = [key for key in settings if key not in wanted]
    if unknown:
        valid = nearest(unknown[0], wanted) if wanted else "valid: none"
        typed = " ".join(f"'~algorithm.{axis}.{key}'" for key in unknown)
        raise ConfigError(f"{axis}: {name!r} has no setting {', '.join(map(repr, unknown))}; {valid}. Type {typed}")
    missing = [key for key in wanted if key not in settings]
    if missing:
        typed = " ".join(f"+algorithm.{axis}.{key}=VALUE" for key in missing)
        if isinstance(spec, str):  # a key below it would replace the name
            typed = f"'algorithm.{axis}={{name: {name}, {', '.join(f'{key}: VALUE' for key in missing)}}}'"
        raise ConfigError(
            f"{axis}: {name!r} needs {', '.join(missing)}, got {sorted(settings) or 'no settings'}. Type {typed}"
        )
    for key, value in settings.items():
        check_value(f"{axis}.{key}", value, wanted[key])
    return partial(function, **settings)


def settings_of(function: Callable[..., Any]) -> dict[str, Any]:
    """`{setting: type hint}` of a choice: its keyword-only parameters, in order."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_value(key: str, value: Any, hint: Any) -> None:
    """Refuse a value that the type hint does not allow. Numbers must be finite and not negative."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = {word for option in options if get_origin(option) is Literal for word in get_args(option)}
    numeric = tuple(kind for kind in (int, float) if kind in options)
    if value is None and type(None) in options:
        return
    if isinstance(value, str) and value in words:
        return
    if numeric and isinstance(value, (int, float)) and not isinstance(value, bool):
        whole = float in numeric or isinstance(value, int)
        if whole and math.isfinite(value) and value >= 0:
            return
    expected = [repr(word) for word in sorted(words)]
    expected += ["a finite number >= 0" if float in numeric else "a whole number >= 0"] if numeric else []
    expected += ["null"] if type(None) in options else []
    raise ConfigError(
        f"{key}: got {value!r} ({type(value).__name__}); valid: {' or '.join(expected)}. Type algorithm.{key}=VALUE"
    )


def _split(axis: str, spec: str | Mapping[str, Any], table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        name, settings, typed = spec, {}, f"algorithm.{axis}=NAME"
    elif isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        settings = {str(key): spec[key] for key in spec}
        name, typed = settings.pop("name"), f"algorithm.{axis}.name=NAME"
    else:
        raise ConfigError(
            f"{axis}: got {spec!r}; valid: one of {', '.join(sorted(table))}, or {{name: ..., setting: value}}. "
            f"Type algorithm.{axis}.name=NAME"
        )
    if name not in table:
        raise ConfigError(f"{axis}: got {name!r}; {nearest(name, table)}. Type {typed}")
    return name, settings
