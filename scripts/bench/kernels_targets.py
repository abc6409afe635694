"""What the kernels are to reach on an H200, and what the committed measurements say of it. Standard library only.

Where a target covers several shapes or kernels, the worst of them counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

GPU = "H200"  # in the name of those that are judged
OURS, COPY = "triton", "copy"

Row = Mapping[str, Any]
Rows = Sequence[Row]


class Unmeasured(Exception):
    """There is no number, and ours is not to blame."""


class Failed(Exception):
    """There is no number because ours failed."""


class Found(NamedTuple):
    """A number, and the row that it is of."""

    value: float
    where: str


class Target(NamedTuple):
    """`kernel` and `words` as in the list of targets; `value` takes a record's rows. `least`: the limit is a least
    value, else it is a greatest one."""

    kernel: str
    words: str
    limit: float
    value: Callable[[Rows], Found]
    form: str = "{:.2f}x"
    least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def missed_by(self, value: float) -> str:
        return self.form.format(abs(self.limit - value)).replace("%", " points")


class Verdict(NamedTuple):
    """`state` is "met", "missed" or "unmeasured", `text` what was measured or why not."""

    target: Target
    state: str
    text: str


def judge(target: Target, rows: Rows) -> Verdict:
    try:
        found = target.value(rows)
    except Unmeasured as reason:
        return Verdict(target, "unmeasured", str(reason))
    except Failed as reason:
        return Verdict(target, "missed", str(reason))
    text = f"{target.form.format(found.value)} ({found.where})"
    if target.met(found.value):
        return Verdict(target, "met", text)
    return Verdict(target, "missed", f"{text}, by {target.missed_by(found.value)}")


def verdicts(record: Mapping[str, Any] | None) -> list[Verdict]:
    """Of every target, in order; all unmeasured without a record."""
    rows = [row for group in record["groups"].values() for row in group["rows"]] if record else []
    return [judge(target, rows) for target in TARGETS]


# From rows to a number


def picked(rows: Rows, group: str, kinds: str, at: Sequence[int] = ()) -> list[Row]:
    """Judged rows of a group whose kind is one of `kinds` ("forward,backward"), or those of one shape."""
    found = [r for r in rows if r["group"] == group and r["kind"] in kinds.split(",") and r["judged"]]
    found = [r for r in found if not at or r["shape"] == list(at)]
    if missing := [kind for kind in kinds.split(",") if kind not in [r["kind"] for r in found]]:
        raise Unmeasured(f"no row of {group}: {', '.join(missing)}")
    for row in found:
        side(row, OURS)
    return found


def side(row: Row, name: str) -> Mapping[str, Any]:
    if "error" in row:
        raise Failed(f"{where(row)}: {row['error']}")
    found = row["sides"].get(name, {"error": "not run"})
    if "error" in found:
        raise (Failed if name == OURS else Unmeasured)(f"{where(row)}, {name}: {found['error']}")
    return found


def median(row: Row, name: str) -> float:
    """Milliseconds."""
    return side(row, name)["ms"]["median"]


def where(row: Row) -> str:
    return f"{row['kind']} {'x'.join(map(str, row['shape']))}"


def worst(of: Callable[[Iterable[float]], float], values: Mapping[str, float | None]) -> Found:
    """The least or greatest; what is null in a file was no number."""
    for place, value in values.items():
        if value is None or math.isnan(value):
            raise Failed(f"{place}: not a number")
    extreme = of(values.values())  # type: ignore[arg-type]
    return Found(extreme, next(place for place, value in values.items() if value == extreme))


def of_copy(group: str, kinds: str) -> Callable[[Rows], Found]:
    """Our bytes per second over those of a large copy in the same row."""

    def value(rows: Rows) -> Found:
        found = picked(rows, group, kinds)
        return worst(min, {where(r): side(r, OURS)["gb_per_s"] / side(r, COPY)["gb_per_s"] for r in found})

    return value


def faster(group: str, kinds: str, *rivals: str, at: Sequence[int] = ()) -> Callable[[Rows], Found]:
    """The time of the fastest rival over ours, where there is one that can do it."""

    def value(rows: Rows) -> Found:
        found = picked(rows, group, kinds, at)
        theirs = {where(r): [median(r, rival) for rival in rivals if "ms" in r["sides"].get(rival, {})] for r in found}
        if not any(theirs.values()):
            side(found[0], rivals[0])
        return worst(min, {where(r): min(ms) / median(r, OURS) for r in found if (ms := theirs[where(r)])})

    return value


def share(group: str, kinds: str, rival: str, key: str = "") -> Callable[[Rows], Found]:
    """Our time, or what else `key` names, over the rival's."""

    def number(row: Row, name: str) -> float:
        return side(row, name)[key] if key else median(row, name)

    def value(rows: Rows) -> Found:
        found = picked(rows, group, kinds)
        return worst(max, {where(r): number(r, OURS) / number(r, rival) for r in found})

    return value


def rate(group: str, kinds: str, at: Sequence[int]) -> Callable[[Rows], Found]:
    """TFLOP/s."""

    def value(rows: Rows) -> Found:
        return worst(min, {where(r): side(r, OURS)["tflop_per_s"] for r in picked(rows, group, kinds, at)})

    return value


def measured(group: str, kinds: str) -> Callable[[Rows], Found]:
    """The share of rows in which both ways of `dispatch` were tried: one that cannot do a shape was, too."""

    def value(rows: Rows) -> Found:
        found = picked(rows, group, kinds)
        both = [r for r in found if {"torch", OURS} <= set(r["sides"])]
        without = [where(r) for r in found if r not in both]
        return Found(len(both) / len(found), f"not {', '.join(without)}" if without else f"{len(found)} rows")

    return value


def checked(of: Callable[[Iterable[float]], float], key: str, groups: str, kinds: str = "") -> Callable[[Rows], Found]:
    """The worst of a check of ours, over all rows of `groups` that have it."""

    def value(rows: Rows) -> Found:
        found = [r for r in rows if r["group"] in groups.split(",") and (not kinds or r["kind"] in kinds.split(","))]
        for row in found:
            side(row, OURS)
            if "error" in row.get("checks", {}):
                raise Failed(f"{where(row)}, check: {row['checks']['error']}")
        values = {f"{r['group']} {where(r)}": r["checks"][key] for r in found if key in r.get("checks", {})}
        if not values:
            raise Unmeasured(f"no row of {groups.replace(',', ', ')}")
        return worst(of, values)

    return value


DENSE = "dense block GEMM (1x128 x 128x128) fwd, dgrad, wgrad"
M_GROUPED, K_GROUPED = "M-grouped fwd/dgrad fp8", "K-grouped wgrad fp8"
SWIGLU, PERMUTE = "SwiGLU (+quant) fwd/bwd", "permute / unpermute (+quant), non-atomic backward"
LOGPROBS, NORM = "fused linear log-prob + entropy (no B x T x V tensor)", "RMSNorm (+quant)"
QUANTISE = "quantise 1x128 / 128x128 / fused dual (row + transposed)"
BF16, MOE = "bf16 grouped GEMM", "whole MoE layer fwd+bwd"
LARGE = (8, 4096, 4096, 7168)  # experts, rows of each, N, K
PERCENT, TFLOPS = "{:.0%}", "{:.0f} TFLOP/s"
PRODUCTS = "dense,grouped_fp8,grouped_bf16"

TARGETS = (
    Target(QUANTISE, ">= 85% of the measured copy bandwidth", 0.85, of_copy("quantise", "rows,blocks,both"), PERCENT),
    Target(QUANTISE, "dual >= 1.4x two kernels", 1.4, faster("quantise", "both", "two kernels")),
    Target(QUANTISE, "bytes identical to the torch reference", 1, checked(min, "exact", "quantise"), PERCENT),
    Target(DENSE, "both ways measured at every shape, for the dispatch to F.scaled_mm BlockWise", 1,
           measured("dense", "fwd,dgrad,wgrad"), PERCENT),
    *(Target(DENSE, f"Triton {kind} >= 0.70x of F.scaled_mm BlockWise (stretch 0.85)", 0.7,
             faster("dense", kind, "F.scaled_mm")) for kind in ("fwd", "dgrad", "wgrad")),
    Target(DENSE, ">= 1.3x bf16 torch.mm at M4096 N7168 K16384", 1.3,
           faster("dense", "fwd", "torch.mm", at=(4096, 7168, 16384))),
    *(Target(M_GROUPED, f"{kind} >= 900 TFLOP/s at E8 x 4096 (N4096 K7168)", 900, rate("grouped_fp8", kind, LARGE),
             TFLOPS) for kind in ("fwd", "dgrad")),
    *(Target(M_GROUPED, f"{kind} >= 1.4x bf16 torch._grouped_mm at E8 x 4096 (N4096 K7168)", 1.4,
             faster("grouped_fp8", kind, "F.grouped_mm", at=LARGE)) for kind in ("fwd", "dgrad")),
    Target(M_GROUPED, ">= 10x a Python loop at E128, 2048x768 (whole layer, forward)", 10,
           faster("moe", "against a loop", "loop")),
    Target(K_GROUPED, ">= 600 TFLOP/s at E8 x 4096 (N4096 K7168)", 600, rate("grouped_fp8", "wgrad", LARGE), TFLOPS),
    Target(BF16, "both ways measured at every shape, for the dispatcher's choice", 1,
           measured("grouped_bf16", "fwd,bwd"), PERCENT),
    Target(SWIGLU, ">= 80% bandwidth", 0.8, of_copy("swiglu", "fwd,bwd,quantised"), PERCENT),
    Target(SWIGLU, ">= 1.6x unfused", 1.6, faster("swiglu", "fwd,bwd,quantised", "unfused")),
    Target(PERMUTE, "permute >= 80% bandwidth", 0.8, of_copy("permute", "fwd,bwd,quantised"), PERCENT),
    Target(PERMUTE, "unpermute >= 80% bandwidth", 0.8, of_copy("unpermute", "fwd,bwd"), PERCENT),
    # Not permute's forward in bf16: nothing is fused there, index_select moves the same bytes.
    Target(PERMUTE, "permute >= 2x unfused (+quant, backward)", 2, faster("permute", "bwd,quantised", "unfused")),
    Target(PERMUTE, "unpermute >= 2x unfused", 2, faster("unpermute", "fwd,bwd", "unfused")),
    Target(LOGPROBS, "<= 1.6x the bare lm_head GEMMs fwd+bwd", 1.6, share("logprobs", "fwd+bwd", "bare GEMMs"),
           least=False),
    Target(LOGPROBS, "peak memory <= 1/3 of naive", 1 / 3, share("logprobs", "fwd+bwd", "naive", "peak_mib"),
           least=False),
    Target(LOGPROBS, "log-probs <= 0 always", 0, checked(max, "largest", "logprobs"), "{:.3g}", least=False),
    Target(NORM, ">= 85% bandwidth", 0.85, of_copy("rms_norm", "fwd,bwd,quantised"), PERCENT),
    Target(MOE, ">= 1.2x bf16 at 7168x2048 experts", 1.2, faster("moe", "fwd+bwd", "bf16", "bf16 by ours")),
    Target("tolerances", "1 - 2<x,y>/(|x|^2+|y|^2) < 1e-3 against the bf16 product", 1e-3,
           checked(max, "diff", PRODUCTS), "{:.2e}", least=False),
    Target("tolerances", "SQNR >= 28 dB dense", 28, checked(min, "sqnr", "dense"), "{:.1f} dB"),
    Target("tolerances", "SQNR >= 26 dB grouped gradients", 26, checked(min, "sqnr", "grouped_fp8", "dgrad,wgrad"),
           "{:.1f} dB"),
    Target("tolerances", "identical from run to run", 1,
           checked(min, "repeats", f"{PRODUCTS},quantise,swiglu,permute,unpermute,rms_norm,logprobs,linear,moe"),
           PERCENT),
)  # fmt: skip
