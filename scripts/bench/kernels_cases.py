"""All groups of cases, in the order in which they are measured."""

from __future__ import annotations

from bench import kernels_dense, kernels_routes, kernels_streams
from bench.kernels_measure import Case, Kind

_ALL = {**kernels_streams.GROUPS, **kernels_routes.GROUPS, **kernels_dense.GROUPS}
GROUPS: dict[str, tuple[Kind, ...]] = {
    name: _ALL[name]
    for name in ("ceilings", "quantise", "dense", "swiglu", "permute", "unpermute", "rms_norm", "forms", "linear")
}


def cases(group: str, dry: bool) -> list[Case]:
    """Of a group; `dry`: one tiny one of each kind."""
    return [case for kind in GROUPS[group] for case in kind.cases(group, dry)]
