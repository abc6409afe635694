"""Studies that compare ways of learning on one task: their arms, what is measured, and their tables.

A study's arms differ in a few overrides; the same arm in two studies is one training.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from studies.runs import Training, curve, read_json
from studies.stats import Interval, paired_interval, t_interval, verdict

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
COMMON = ("experiment=arith_gdpo", "extras.threads=1", "evaluation.n=500")
GRPO = ("algorithm=grpo", "algorithm.kl.weight=0")
TEACHER = ("reference=teacher", "reference.name=arith-1m.gdpo")
# Four updates per round, in pieces of the same size as one update's.
FOUR = ("rollout.shape.minibatches=4", "rollout.shape.micro_batches=1")
# At this size the critic learns at the rate of priming, 0.002, not at ten times that of RL.
CRITIC = ("algorithm.critic.lr_factor=40", "algorithm.advantage.lam=1.0")
TAIL = 10  # rounds at the end of training whose mean is the figure of a run
REACH = 0.6  # share of right answers, over TAIL // 2 rounds, that it takes some tokens to reach


@dataclass(frozen=True)
class Study:
    """One comparison.

    Args:
        arms: `{name: overrides}`; the others are compared with the first.
        updates: optimizer steps per round.
        kl: whether the distance to the start is logged: not where the reference is a teacher.
    """

    arms: Mapping[str, tuple[str, ...]]
    updates: int = 1
    kl: bool = True


STUDIES: dict[str, Study] = {
    "opd": Study(
        {"GRPO": GRPO, "OPD": ("algorithm=opd", *TEACHER), "GKD": ("algorithm=gkd", *TEACHER)},
        kl=False,
    ),
    "ppo": Study({"GRPO": (*GRPO, *FOUR), "PPO": ("algorithm=ppo", *FOUR, *CRITIC)}, updates=4),
    "lora": Study({"GRPO": GRPO, "GRPO, LoRA": (*GRPO, "adapter=lora", "optimizer.lr=0.0005")}),
    "fp8": Study({"GRPO": GRPO, "GRPO in FP8": (*GRPO, "kernels=fp8_emulated")}),
    "rpg": Study(
        {
            "GRPO": (*GRPO, *FOUR, "optimizer.lr=0.0002"),
            "RPG": ("algorithm=rpg", *FOUR, "optimizer.lr=0.0002"),
        },
        updates=4,
    ),
}


def training(overrides: Sequence[str], seed: int, rounds: int) -> Training:
    """The run of an arm; named by what it is, so that studies share it."""
    words = [text.replace("algorithm=", "").replace("rollout.shape.", "") for text in overrides]
    name = re.sub(r"[^\w.-]", "_", "-".join([*words, f"rounds{rounds}", f"seed{seed}"]))  # nothing that Hydra parses
    return Training(name, (*COMMON, *overrides, f"rollout.shape.rounds={rounds}", f"seed={seed}"))


def measure(study: Study, arm: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """What is kept of one run: a number per round of each curve, and figures of its end."""
    summary = read_json(run_dir / "summary.json")
    names = {"answer": "reward/answer/mean", "length": "completion/length", "ratio_q99": "ratio/q99"}
    last = slice(study.updates - 1, None, study.updates)  # of each round
    curves = {name: curve(run_dir, metric)[last] for name, metric in names.items()}
    if study.kl:
        # The first update of a round: its policy sampled these tokens itself. Later ones estimate it from another's.
        steps = curve(run_dir, "kl/k3")
        curves |= {"kl": steps[:: study.updates], "kl_largest": [max(steps)]}
    completions = len(read_completions(run_dir))
    curves["tokens"] = list(itertools.accumulate(length * completions for length in curves.pop("length")))
    return {
        "arm": arm,
        "seed": seed,
        "curves": curves,
        "held_out": summary["pass_at_1_after"],
        "before": summary["pass_at_1_before"],
        "seconds": summary["seconds"],
    }


def read_completions(run_dir: Path) -> list[dict[str, Any]]:
    """Those of the first round."""
    path = min((run_dir / "completions").glob("step-*.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens_to_reach(run: Mapping[str, Any]) -> float:
    """Generated tokens (thousands) until the running mean of right answers reaches `REACH`; all of them if never."""
    answers, window = run["curves"]["answer"], TAIL // 2
    for end in range(window, len(answers) + 1):
        if statistics.fmean(answers[end - window : end]) >= REACH:
            return run["curves"]["tokens"][end - 1] / 1000
    return run["curves"]["tokens"][-1] / 1000


Measure = Callable[[Mapping[str, Any]], float]


def measures(study: Study) -> dict[str, tuple[Measure, str]]:
    """`{column: (of a run, format)}`."""
    found: dict[str, tuple[Measure, str]] = {
        "held-out accuracy": (lambda run: run["held_out"], ".3f"),
        f"right answers, last {TAIL} rounds": (lambda run: statistics.fmean(run["curves"]["answer"][-TAIL:]), ".3f"),
        f"thousand tokens to {REACH:.0%}": (tokens_to_reach, ".0f"),
    }
    if study.kl:
        found[f"KL to the start, last {TAIL} rounds"] = (
            lambda run: statistics.fmean(run["curves"]["kl"][-TAIL:]),
            ".3f",
        )
    if study.updates > 1:
        found["log10 of the largest k3 of any update"] = (lambda run: math.log10(run["curves"]["kl_largest"][0]), ".1f")
        found["99% quantile of the ratio"] = (lambda run: statistics.fmean(run["curves"]["ratio_q99"][-TAIL:]), ".2f")
    return found


def summary(study: Study, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Intervals of every measure: per arm, and of the paired differences to the first arm."""
    found: dict[str, Any] = {}
    for column, (of_run, _) in measures(study).items():
        per_arm = {arm: {r["seed"]: of_run(r) for r in runs if r["arm"] == arm} for arm in study.arms}
        first, *others = per_arm
        found[column] = {
            "arms": {arm: t_interval(list(values.values())) for arm, values in per_arm.items()},
            "minus": {arm: paired_interval(per_arm[arm], per_arm[first]) for arm in others},
        }
    return found


def record_of(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{name}.json").read_text())


def levels_table(name: str) -> str:
    """A row per arm: mean over seeds and 95% t-interval."""
    study, record = STUDIES[name], record_of(name)
    forms = {column: form for column, (_, form) in measures(study).items()}
    lines = [f"| | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|"]
    for arm in study.arms:
        cells = (Interval(*record["summary"][column]["arms"][arm]).text(form) for column, form in forms.items())
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences_table(name: str) -> str:
    """A row per measure: each arm minus the first, paired by seed, with a word."""
    study, record = STUDIES[name], record_of(name)
    first, *others = study.arms
    heads = " | ".join(f"{arm} minus {first} | " for arm in others)
    lines = [f"| | {heads}|", "|---" * (1 + 2 * len(others)) + "|"]
    for column, (_, form) in measures(study).items():
        cells = []
        for arm in others:
            difference = Interval(*record["summary"][column]["minus"][arm])
            cells.append(f"{difference.text('+' + form)} | {verdict(difference)}")
        lines.append(f"| {column} | {' | '.join(cells)} |")
    return "\n".join(lines)


def setting_line(name: str) -> str:
    """With what the numbers were made."""
    record = record_of(name)
    settings = record["settings"]
    return (
        f"{len(settings['seeds'])} seeds ({', '.join(map(str, settings['seeds']))}), {settings['rounds']} rounds each; "
        f"commit {', '.join(commit[:7] for commit in record['commits'])}; {record['machine']['device']}, torch "
        f"{record['versions']['torch']}, {record['date'][:10]}."
    )


def tables(name: str) -> dict[str, Callable[[], str]]:
    """Of the page docs/studies/NAME.md."""
    made = {"setting": setting_line, "levels": levels_table, "differences": differences_table}
    return {key: partial(table, name) for key, table in made.items()}
