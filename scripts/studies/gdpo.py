"""GDPO against GRPO: what is compared, what is measured, and the tables of docs/studies/gdpo.md.

B completions   R rewards   G completions per prompt
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_reason.evaluate.metrics import paired_difference
from lit_reason.objectives import ADVANTAGES
from studies.stats import Interval, paired_interval, t_interval, verdict

# What `algorithm.advantage` is; all else is the same.
ARMS = {
    "GDPO": "{name: gdpo, eps: 1.0e-4, ddof: 1, batch_norm: sequence, batch_eps: 1.0e-4}",
    "GRPO": "{name: group_norm, eps: 1.0e-4, ddof: 1}",
    "GRPO without std": "{name: group_mean}",
}
# The same three for comparing advantages: without eps, which would tell apart what division by the std makes equal,
# and without GDPO's batch step, a factor common to all.
BARE: dict[str, tuple[str, dict[str, Any]]] = {
    "GDPO": ("gdpo", {"eps": 0.0, "ddof": 1, "batch_norm": None, "batch_eps": 0.0}),
    "GRPO": ("group_norm", {"eps": 0.0, "ddof": 1}),
    "GRPO without std": ("group_mean", {}),
}
REWARDS = ("answer", "format", "length")
CURVES = (*REWARDS, "all three")
HELD_OUT = (*REWARDS, "total", "answer_anywhere")
TAIL = 10  # rounds at the end of training whose mean is the figure of a run
DIGITS = 9  # of an advantage in float64: rounding errors are far below, differences far above


def advantages(arm: str, rewards_BR: Tensor, group_B: Tensor, valid_B: Tensor | None = None) -> Tensor:
    """advantages_B (float64) of an arm for rewards of weight 1, rounded so that equal ones are equal."""
    name, settings = BARE[arm]
    rewards_BR = rewards_BR.double()
    valid_B = torch.ones(len(rewards_BR), dtype=torch.bool) if valid_B is None else valid_B
    weights_R = rewards_BR.new_ones(rewards_BR.shape[1])
    found_B = ADVANTAGES[name](rewards_BR, weights_R, group_B, valid_B, torch.ones(len(rewards_BR), 1), **settings)
    return found_B.round(decimals=DIGITS) + 0.0  # -0.0 becomes 0.0


def distinct_groups(arm: str, completions: int, rewards: int) -> int:
    """How many advantage vectors, order apart, a group can have with 0/1 rewards (arXiv 2601.05242, figure 2)."""
    outcomes = list(itertools.product((0.0, 1.0), repeat=rewards))
    groups = list(itertools.combinations_with_replacement(outcomes, completions))
    rewards_BR = torch.tensor(groups).reshape(-1, rewards)
    return _different(
        advantages(arm, rewards_BR, torch.arange(len(groups)).repeat_interleave(completions)), completions
    )


def _different(advantages_B: Tensor, completions: int) -> int:
    return len({tuple(sorted(row)) for row in advantages_B.view(-1, completions).tolist()})


class Resolution(NamedTuple):
    """How finely a normalisation tells the completions of one round apart.

    Args:
        values: distinct advantages within a group, mean over groups.
        groups: distinct advantage vectors among the groups, order apart.
        silent: share of groups whose advantages are all 0.
    """

    values: float
    groups: float
    silent: float


def resolution(arm: str, rows: Sequence[Mapping[str, Any]]) -> Resolution:
    """Of the rows of a round, as `CompletionsTable` writes them: whole groups of one size, in order."""
    found_B, _, completions = _seen(arm, rows)
    groups = found_B.view(-1, completions).tolist()
    return Resolution(
        statistics.fmean(len(set(group)) for group in groups),
        _different(found_B, completions),
        statistics.fmean(not any(group) for group in groups),
    )


def credit(arm: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Each reward's share of what a round's advantages follow: its covariance with them, the shares adding up to 1.

    The covariance of A with r_k within groups is the slope of reward k along the policy gradient step, for a policy
    free to move every completion on its own; a negative share is a reward that is given up for others.
    """
    found_B, rewards_BR, _ = _seen(arm, rows)
    covariance_R = (found_B[:, None] * rewards_BR).mean(0)  # advantages are centred in their groups
    return (covariance_R / covariance_R.sum()).tolist()


def _seen(arm: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor, int]:
    """(advantages_B, rewards_BR, completions per group); what a verifier failed on (null) has the advantage 0."""
    starts = [row["sample_idx"] == 0 for row in rows]
    completions = len(rows) // sum(starts)
    if any(starts[i] != (i % completions == 0) for i in range(len(rows))):
        raise ValueError(f"got {len(rows)} completions in {sum(starts)} groups of unequal size; valid: whole groups")
    values = [[row["rewards"][name] for name in REWARDS] for row in rows]
    valid_B = torch.tensor([None not in row for row in values])
    rewards_BR = torch.tensor([[0.0 if value is None else value for value in row] for row in values]).double()
    return advantages(arm, rewards_BR, torch.arange(len(rows)) // completions, valid_B), rewards_BR, completions


def all_three(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of a round's completions that earn every reward."""
    return statistics.fmean(all(row["rewards"][name] == 1 for name in REWARDS) for row in rows)


def means(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`{reward: mean}` of held-out problems, as `lit-reason-eval` writes them, and the rewards' sum, `total`."""
    found = {name: statistics.fmean(item["columns"][name] for item in items) for name in (*REWARDS, "answer_anywhere")}
    return found | {"total": sum(found[name] for name in REWARDS)}


def over_problems(items: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The held-out differences with intervals over *problems*, each problem's rewards averaged over seeds first.

    Args:
        items: `{(arm, seed): one greedy completion per held-out problem}`.
    """
    arms = dict.fromkeys(arm for arm, _ in items)
    found: dict[str, Any] = {}
    for name in REWARDS:
        average = {
            arm: {
                group[0]["prompt_id"]: statistics.fmean(item["columns"][name] for item in group)
                for group in zip(*(rows for (other, _), rows in items.items() if other == arm), strict=True)
            }
            for arm in arms
        }
        found[name] = {"GDPO minus": {}}
        for arm in average.keys() - {"GDPO"}:
            difference = paired_difference(average[arm], average["GDPO"])
            found[name]["GDPO minus"][arm] = Interval(difference.value, difference.low, difference.high)
    return found


def counts() -> dict[str, Any]:
    """The paper's figure: distinct groups by group size with two rewards, by number of rewards with groups of 4."""
    return {
        "completions": {arm: {str(g): distinct_groups(arm, g, 2) for g in range(2, 9)} for arm in ARMS},
        "rewards": {arm: {str(r): distinct_groups(arm, 4, r) for r in (2, 3, 4)} for arm in ARMS},
    }


# From a record's runs to tables: one number per run and measure, then intervals over seeds.

Measure = Callable[[Mapping[str, Any]], float]


def at_end(name: str) -> Measure:
    """Mean of a curve's last rounds."""
    return lambda run: statistics.fmean(run["curves"][name][-TAIL:])


def throughout(name: str) -> Measure:
    """Mean of the whole curve: higher for what rises sooner."""
    return lambda run: statistics.fmean(run["curves"][name])


def on_held_out(name: str) -> Measure:
    return lambda run: run["held_out"][name]


def arms_of(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arms that were run, in the order of `ARMS`."""
    return [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]


def by_seed(runs: Sequence[Mapping[str, Any]], arm: str, measure: Measure) -> dict[int, float]:
    return {run["seed"]: measure(run) for run in runs if run["arm"] == arm}


def measures() -> dict[str, dict[str, Measure]]:
    """`{where: {name: measure}}`, all that the tables tell."""
    return {
        "held-out": {name: on_held_out(name) for name in HELD_OUT},
        f"last {TAIL} rounds": {name: at_end(name) for name in CURVES},
        "all rounds": {name: throughout(name) for name in CURVES},
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Intervals of every measure: per arm, and of GDPO's paired differences to the others."""
    found: dict[str, Any] = {}
    for where, named in measures().items():
        for name, measure in named.items():
            per_arm = {arm: by_seed(runs, arm, measure) for arm in arms_of(runs)}
            others = [arm for arm in per_arm if arm != "GDPO"]
            found.setdefault(where, {})[name] = {
                "arms": {arm: t_interval(list(values.values())) for arm, values in per_arm.items()},
                "GDPO minus": {arm: paired_interval(per_arm["GDPO"], per_arm[arm]) for arm in others},
            }
    return found


def levels_table(record: Mapping[str, Any], where: str) -> str:
    """A row per arm, a column per measure."""
    columns = record["summary"][where]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm in arms_of(record["runs"]):
        cells = (Interval(*column["arms"][arm]).text() for column in columns.values())
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def held_out_table(record: Mapping[str, Any]) -> str:
    """Below a line for the start, which is one model for all runs."""
    head, rule, *rows = levels_table(record, "held-out").splitlines()
    start = " | ".join(f"{record['start'][name]:.3f}" for name in HELD_OUT)
    return "\n".join([head, rule, f"| the start | {start} |", *rows])


def differences_table(record: Mapping[str, Any]) -> str:
    """A row per measure: GDPO minus each of the others, paired by seed, with a word."""
    others = [arm for arm in arms_of(record["runs"]) if arm != "GDPO"]
    lines = ["| GDPO minus | " + " | ".join(f"{arm} | " for arm in others) + "|", "|---" * (1 + 2 * len(others)) + "|"]
    for where, columns in record["summary"].items():
        for name, column in columns.items():
            cells = []
            for arm in others:
                difference = Interval(*column["GDPO minus"][arm])
                cells.append(f"{difference.text('+.3f')} | {verdict(difference)}")
            lines.append(f"| {where}: {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def resolution_table(record: Mapping[str, Any]) -> str:
    """On the same rollouts: each normalisation's resolution, mean over rounds, interval over seeds."""
    lines = [
        "| rollouts of | advantages of | values in a group | different groups in a round | groups without signal |",
        "|---|---|---|---|---|",
    ]
    for arm, seen in itertools.product(arms_of(record["runs"]), ARMS):
        runs = [run["resolution"][seen] for run in record["runs"] if run["arm"] == arm]
        values, groups, silent = (t_interval(list(column)) for column in zip(*runs, strict=True))
        lines.append(f"| {arm} | {seen} | {values.text('.2f')} | {groups.text('.1f')} | {silent.text('.3f')} |")
    return "\n".join(lines)


def credit_table(record: Mapping[str, Any]) -> str:
    """On the same rollouts: what each normalisation's advantages follow."""
    lines = [f"| rollouts of | advantages of | {' | '.join(REWARDS)} |", "|---" * (2 + len(REWARDS)) + "|"]
    for arm, seen in itertools.product(arms_of(record["runs"]), ARMS):
        runs = [run["credit"][seen] for run in record["runs"] if run["arm"] == arm]
        cells = (t_interval(list(column)).text(".3f") for column in zip(*runs, strict=True))
        lines.append(f"| {arm} | {seen} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts_table(record: Mapping[str, Any]) -> str:
    """Distinct groups as enumerated."""
    completions, rewards = record["distinct_groups"]["completions"], record["distinct_groups"]["rewards"]
    heads = [f"G={g}, 2" for g in completions["GRPO"]] + [f"G=4, {r}" for r in rewards["GRPO"] if r != "2"]
    lines = [f"| completions, rewards | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for arm in ARMS:
        cells = [*completions[arm].values(), *(count for r, count in rewards[arm].items() if r != "2")]
        lines.append(f"| {arm} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def setting_line(record: Mapping[str, Any]) -> str:
    """With what the numbers were made."""
    settings, versions = record["settings"], record["versions"]
    return (
        f"{len(settings['seeds'])} seeds ({', '.join(map(str, settings['seeds']))}), {settings['rounds']} rounds each; "
        f"commit {', '.join(commit[:7] for commit in record['commits'])}; {record['machine']['device']}, torch "
        f"{versions['torch']}, {record['date'][:10]}."
    )


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "setting": setting_line,
    "held_out": held_out_table,
    "last_rounds": partial(levels_table, where=f"last {TAIL} rounds"),
    "differences": differences_table,
    "counts": counts_table,
    "resolution": resolution_table,
    "credit": credit_table,
}
