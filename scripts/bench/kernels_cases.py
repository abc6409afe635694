"""All groups of cases, in the order of measuring: "linear" and "moe" go by the dispatch table that the others fill."""

from __future__ import annotations

from bench import kernels_dense, kernels_grouped, kernels_logprobs, kernels_routes, kernels_streams
from bench.kernels_measure import Case, Kind

_MODULES = (kernels_dense, kernels_streams, kernels_routes, kernels_logprobs, kernels_grouped)
_ALL: dict[str, tuple[Kind, ...]] = {name: kinds for module in _MODULES for name, kinds in module.GROUPS.items()}
_LAST = ("forms", "linear", "moe")
GROUPS = {name: _ALL[name] for name in (*(name for name in _ALL if name not in _LAST), *_LAST)}


def cases(group: str, dry: bool) -> list[Case]:
    """Of a group; `dry`: one tiny one of each kind."""
    return [case for kind in GROUPS[group] for case in kind.cases(group, dry)]
