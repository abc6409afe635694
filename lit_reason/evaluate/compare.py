"""Before and after on the same questions: a table for people, a dictionary for `summary.json`.

The verdict comes from the *paired* difference (each question is its own control), the two separate intervals are shown
beside it: they may overlap although the paired difference is clear, never the other way round at equal n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from lit_reason.errors import DataError
from lit_reason.evaluate.evaluator import FORMAT_BLIND, EvalReport, correct_by_question
from lit_reason.evaluate.metrics import Estimate, PairedDifference, paired_difference, proportion


@dataclass(frozen=True, slots=True)
class Line:
    """One measured quantity: before, after and, for accuracies, the paired difference."""

    name: str
    before: Estimate
    after: Estimate
    paired: PairedDifference | None = None


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    Args:
        pass_at_1: greedy accuracy, decided by `verdict`.
        format_blind: the same judged without regard to format; None when the rubric has no such column.
        rewards: one line per reward column and `"total"`, the rubric's weighted sum.
        faulty: questions left out because a verifier failed on either side.
    """

    pass_at_1: Line
    format_blind: Line | None
    rewards: tuple[Line, ...]
    faulty: int

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"` or `"no difference shown"`; never "better" when the interval holds 0."""
        assert self.pass_at_1.paired is not None
        return self.pass_at_1.paired.verdict

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, flat where the demo's `summary.json` wants it flat; None for the mean of nothing."""
        out: dict[str, Any] = {"n": self.pass_at_1.before.n, "faulty": self.faulty}
        for key, line in (("pass_at_1", self.pass_at_1), ("pass_at_1_format_blind", self.format_blind)):
            if line is None or line.paired is None:
                continue
            suffix = key.removeprefix("pass_at_1")
            out |= {
                f"{key}_before": line.before.value,
                f"{key}_after": line.after.value,
                f"ci{suffix}_before": list(line.before.ci),
                f"ci{suffix}_after": list(line.after.ci),
                f"difference{suffix}": line.paired.value,
                f"ci{suffix}_difference": [line.paired.low, line.paired.high],
                f"verdict{suffix}": line.paired.verdict,
                f"intervals_disjoint{suffix}": line.before.disjoint(line.after),
            }
        total = self.rewards[-1]
        out |= {"reward_before": _finite(total.before), "reward_after": _finite(total.after)}
        out["rewards"] = {r.name: {"before": _finite(r.before), "after": _finite(r.after)} for r in self.rewards}
        return out

    def table(self) -> Table:
        """A rich table; print it with `rich.print(comparison.table())`."""
        table = Table(title=f"{self.pass_at_1.before.n} held-out questions: {self.verdict}", title_justify="left")
        for column in ("", "before", "after", "change"):
            table.add_column(column, justify="left" if not column else "right")
        for line in (self.pass_at_1, self.format_blind):
            if line is not None and line.paired is not None:
                d = line.paired
                change = f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
                table.add_row(line.name, _percent(line.before), _percent(line.after), change)
        for line in self.rewards:
            change = f"{line.after.value - line.before.value:+.3f}"
            table.add_row(f"reward {line.name}", f"{line.before.value:.3f}", f"{line.after.value:.3f}", change)
        return table


def _finite(e: Estimate) -> float | None:
    return e.value if math.isfinite(e.value) else None


def _percent(e: Estimate) -> str:
    return f"{100 * e.value:.1f}% [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def compare(before: EvalReport, after: EvalReport, seed: int = 0) -> Comparison:
    """Compare two greedy evaluations of the same prompts.

    Questions on which a verifier failed on either side are left out of both, so that the pairs stay pairs.

    Example::

        comparison = compare(before, after)
        rich.print(comparison.table())
        comparison.to_dict()["verdict"]      # "better"
    """
    ids_before, ids_after = {i.prompt_id for i in before.items}, {i.prompt_id for i in after.items}
    if ids_before != ids_after:
        raise DataError(
            f"compare needs two evaluations of the same prompts: {len(ids_before - ids_after)} questions are only "
            f"before, {len(ids_after - ids_before)} only after, {len(ids_before & ids_after)} are shared"
        )
    left, right = correct_by_question(before.items), correct_by_question(after.items)
    if not set(left) & set(right):
        column = before.correct_column
        faults = [item.faults[column] for item in before.items + after.items if column in item.faults]
        raise DataError(
            f"nothing to compare: the reward {column!r} failed on each of the {len(ids_before)} questions, before or "
            f"after; the first: {faults[0]}"
        )
    blind = None
    if FORMAT_BLIND in before.names and FORMAT_BLIND in after.names:
        blind_left = correct_by_question(before.items, FORMAT_BLIND)
        blind_right = correct_by_question(after.items, FORMAT_BLIND)
        blind = _line("pass@1 format-blind", blind_left, blind_right, seed)
    rewards_before, rewards_after = before.rewards, after.rewards
    rewards = tuple(
        Line(name, rewards_before[name], rewards_after[name]) for name in rewards_before if name in rewards_after
    )
    faulty = len(ids_before) - len(set(left) & set(right))
    return Comparison(_line("pass@1", left, right, seed), blind, rewards, faulty)


def _line(name: str, before: dict[str, float], after: dict[str, float], seed: int) -> Line:
    shared = [id_ for id_ in before if id_ in after]
    left, right = {i: before[i] for i in shared}, {i: after[i] for i in shared}
    paired = paired_difference(left, right, seed=seed)
    return Line(name, proportion(list(left.values())), proportion(list(right.values())), paired)
