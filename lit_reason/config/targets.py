"""Which `_target_` may be imported and called: default-deny, by kind.

A target passes two gates. The *string* must be a public dotted name below a root in `KNOWN_ROOTS` or below a
prefix the user allowed. The *object* it resolves to must be

    a class or function that lit_reason or lit_kernels itself defines (functions: of the packages in FUNCTIONS_FROM);
    a class of one of the kinds Lightning and torch compose (Module, Optimizer, Callback, Logger, ...);
    or one of the few names in `LISTED`.

So neither `torch.utils.collect_env.run` (right root, wrong kind) nor `lit_reason.models.rope.os.system` (a module
re-exported through ours) is reached. Hydra's own block list lets `sympy.sympify` and `numpy.testing.rundocs` pass.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from lit_reason.errors import ConfigError, UnsafeTargetError, nearest

OURS = ("lit_reason", "lit_kernels")
KNOWN_ROOTS = (*OURS, "torch", "lightning", "torchmetrics", "transformers", "peft", "pytorch_optimizer")
LISTED = frozenset({"lightning.pytorch.Trainer", "datetime.timedelta", "torch.device"})

# These build, launch or execute by themselves, so a config must not reach them.
OURS_CLOSED = ("lit_reason.cli", "lit_reason.config", "lit_reason.sandbox")
FUNCTIONS_FROM = tuple(
    f"lit_reason.{p}" for p in ("models", "optim", "data", "rollout", "rewards", "objectives", "callbacks")
)
CLOSED_CLASSES = frozenset({"torch.fx.graph_module", "torch.jit", "torch.package"})

# No prefix can open these: the standard library, what evaluates text, and what is checked by kind anyway.
NEVER_ROOTS = frozenset(
    {
        *sys.stdlib_module_names,
        *KNOWN_ROOTS,
        *("posix", "nt", "hydra", "omegaconf", "yaml", "numpy", "scipy", "sympy", "pandas", "numexpr", "IPython"),
        *("cloudpickle", "dill", "joblib", "pip", "setuptools", "pkg_resources", "pytest", "_pytest", "ipykernel"),
        *("fsspec", "requests", "httpx", "psutil", "sh", "fabric", "paramiko", "ray", "dask", "jinja2", "execnet"),
        *("pytorch_lightning", "lightning_fabric", "reasoning_gym", "math_verify", "latex2sympy2_extended"),
    }
)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+")


def locate(target: Any, allow_targets: Sequence[str] = (), where: str = "") -> Any:
    """The class or function that `target` names, if it is allowed.

    Args:
        target: e.g. `"lightning.pytorch.callbacks.RichProgressBar"`.
        allow_targets: the user's own prefixes, e.g. `("my_pkg",)`.
        where: the key it stands under, for messages.

    Raises:
        UnsafeTargetError: it exists or might exist, but a config may not reach it.
        ConfigError: nothing of that name is there.
    """
    prefixes = check_prefixes(allow_targets)
    _check_string(target, prefixes, where)
    if target in LISTED:
        return _walk(target, where, closed=False)
    obj = _walk(target, where, closed=True)
    if not _allowed_object(obj, prefixes):
        what = f"resolves to {_describe(obj)}, which is no kind of object that a config may build"
        raise UnsafeTargetError(_refusal(target, where, what))
    return obj


def check_prefixes(allow_targets: Sequence[str]) -> tuple[str, ...]:
    """The user's prefixes, refused where they would open the standard library or what is checked by kind."""
    if isinstance(allow_targets, str):
        raise ConfigError(
            f"allow_targets={allow_targets!r} is text; valid: a list. Type 'allow_targets=[{allow_targets}]'"
        )
    for prefix in allow_targets:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*", str(prefix)):
            raise UnsafeTargetError(f"allow_targets holds {prefix!r}; valid: the dotted name of your own package")
        if str(prefix).split(".")[0] in NEVER_ROOTS:
            raise UnsafeTargetError(
                f"allow_targets holds {prefix!r}, which stays closed. Name your own package: 'allow_targets=[my_pkg]'"
            )
    return tuple(str(p) for p in allow_targets)


def _check_string(target: Any, prefixes: Sequence[str], where: str) -> None:
    if not isinstance(target, str) or not NAME.fullmatch(target):
        raise UnsafeTargetError(_refusal(target, where, "is no public dotted name such as 'my_pkg.module.Name'"))
    root = target.split(".")[0]
    if root in ("pytorch_lightning", "lightning_fabric"):
        good = target.replace("pytorch_lightning", "lightning.pytorch").replace("lightning_fabric", "lightning.fabric")
        raise UnsafeTargetError(
            f"{_at(where)}_target_: {target} belongs to the package {root}, whose classes fail in a `lightning` "
            f"Trainer. Type _target_: {good}"
        )
    if target in LISTED or root in KNOWN_ROOTS or _below(target, prefixes):
        return
    raise UnsafeTargetError(_refusal(target, where, f"is outside {', '.join(KNOWN_ROOTS)}"))


def _walk(target: str, where: str, closed: bool) -> Any:
    """Import and getattr along the dots; a module reached under a name that is not its own is refused."""
    parts = target.split(".")
    obj: Any = _import(parts[0], target, where)
    for i, part in enumerate(parts[1:], start=2):
        dotted = ".".join(parts[:i])
        if isinstance(obj, ModuleType) and not hasattr(obj, part):
            _import(dotted, target, where, parent=obj)
        if not hasattr(obj, part):
            raise ConfigError(f"{_at(where)}_target_: {target} does not exist. {_choices(obj, part)}")
        obj = getattr(obj, part)
        if closed and isinstance(obj, ModuleType) and obj.__name__ != dotted:
            raise UnsafeTargetError(_refusal(target, where, f"passes through the module {obj.__name__}"))
    return obj


def _import(name: str, target: str, where: str, parent: ModuleType | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name or (parent is not None and not hasattr(parent, "__path__")):
            stem, _, leaf = name.rpartition(".")
            hint = _choices(parent, leaf) if parent is not None else f"Install {name}: pip install {name}"
            raise ConfigError(
                f"{_at(where)}_target_: {target} does not exist in {stem or 'any package'}. {hint}"
            ) from None
        raise ConfigError(
            f"{_at(where)}_target_: {target} needs the package {error.name}, which is not installed. "
            f"Type: pip install {error.name}"
        ) from error


def _choices(obj: Any, part: str) -> str:
    names = [n for n in getattr(obj, "__all__", None) or dir(obj) if n[:1].isupper()]
    return nearest(part, names) if len(names) < 80 else nearest(part, names).split(" valid:")[0]


@cache
def _kinds() -> tuple[type, ...]:
    """The classes whose subclasses a config may build (imports torch and lightning, hence late)."""
    import lightning.pytorch as pl
    import torch
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.pytorch import plugins, profilers, strategies
    from lightning.pytorch.loggers import Logger

    return (
        torch.nn.Module,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
        pl.LightningModule,
        pl.LightningDataModule,
        pl.Callback,
        Logger,
        strategies.Strategy,
        plugins.CheckpointIO,
        plugins.Precision,
        plugins.LayerSync,
        ClusterEnvironment,
        profilers.Profiler,
    )


def _allowed_object(obj: Any, prefixes: Sequence[str]) -> bool:
    module = getattr(obj, "__module__", None)
    if not isinstance(module, str) or not _public(obj):
        return False
    if _below(module, prefixes):
        return inspect.isclass(obj) or _is_factory(obj, prefixes)
    if _below(module, OURS):
        if _below(module, OURS_CLOSED):
            return False
        return inspect.isclass(obj) or (_below(module, FUNCTIONS_FROM) and _is_factory(obj, OURS))
    if not inspect.isclass(obj) or module.split(".")[0] not in KNOWN_ROOTS or _below(module, CLOSED_CLASSES):
        return False
    return issubclass(obj, _kinds())


def _is_factory(obj: Any, prefixes: Sequence[str]) -> bool:
    """A top-level function, or a classmethod that the class's own package (not a base class elsewhere) defines."""
    if inspect.isfunction(obj):
        return "." not in obj.__qualname__
    # A bound method's __module__ is where its function was written, so a base class's method was refused before.
    return inspect.ismethod(obj) and inspect.isclass(obj.__self__) and _below(obj.__self__.__module__, prefixes)


def _public(obj: Any) -> bool:
    name = getattr(obj, "__qualname__", "")
    return bool(name) and not any(part.startswith(("_", "<")) for part in name.split("."))


def _below(name: str, prefixes: Any) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def _describe(obj: Any) -> str:
    kind = "the module" if inspect.ismodule(obj) else "the class" if inspect.isclass(obj) else "the object"
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None) or getattr(obj, "__name__", obj)
    return f"{kind} {module}.{name}" if module else f"{kind} {name}"


def _at(where: str) -> str:
    return f"{where}." if where else ""


def _refusal(target: Any, where: str, reason: str) -> str:
    text = (
        f"refused: {_at(where)}_target_: {target} {reason}.\n"
        "valid: what lit_reason defines, and torch or lightning classes that are a Module, Optimizer, LRScheduler, "
        "LightningModule, LightningDataModule, Callback, Logger, Strategy, Plugin or Profiler."
    )
    root = str(target).split(".")[0]
    if isinstance(target, str) and NAME.fullmatch(target) and root not in NEVER_ROOTS:
        text += f"\nIf {root} is your own package, type 'allow_targets=[{root}]', or `allow_targets: [{root}]` in YAML."
    else:
        text += "\nTo use your own code put it in a package and type 'allow_targets=[my_pkg]'."
    return text
