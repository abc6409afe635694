"""Compare the shipped objectives with files of reference numbers (float64).

    python scripts/check_objectives.py tests/golden --subset
    python scripts/check_objectives.py DIR --objective gdpo_paper

DIR holds `batch_main.json` (the batch), `objectives_main.json` (advantages, loss and gradient per name) and
`gdpo_collapse.json`. Every name is built from a `conf/algorithm/*.yaml` plus overrides, and goes through
`Objective.advantages` and `Objective.loss`, the functions that training calls. Numbers that a case states itself
(clip bounds, eps, KL weight, reward weights, L_max) are read from it and win over the YAML.

Exit status: 0 all agree; 1 an error above 1e-10, a name or file that is not covered (unless --subset), or nothing
checked; 2 a folder or name that does not exist.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_reason.errors import nearest
from lit_reason.objectives import Objective
from lit_reason.types import PolicyBatch

ALGORITHMS = Path(__file__).resolve().parents[1] / "conf" / "algorithm"
TOLERANCE = 1e-10
COLLAPSE = "gdpo_collapse"
KNOWN_FILES = {"batch_main.json", "objectives_main.json", f"{COLLAPSE}.json"}


class Case(NamedTuple):
    """A golden name: which YAML, and what is changed in it. A mapping with `name` replaces the whole axis."""

    algorithm: str
    overrides: dict[str, Any] = {}


class Errors(NamedTuple):
    """Worst absolute error, divided by max(1, largest expected value). None: the file states no such number."""

    advantages: float | None
    loss: float | None
    gradient: float | None

    @property
    def worst(self) -> float:
        return max(e for e in self if e is not None)


def _norm(eps: float, ddof: int = 1) -> dict[str, Any]:
    return {"name": "group_norm", "eps": eps, "ddof": ddof}


def _gdpo(eps: float, batch_eps: float, batch_norm: str | None = "sequence") -> dict[str, Any]:
    return {"name": "gdpo", "eps": eps, "ddof": 1, "batch_norm": batch_norm, "batch_eps": batch_eps}


def _only_kl(estimator: str) -> Case:
    return Case("grpo", {"aggregation": "token_mean", "kl": {"estimator": estimator, "weight": 1.0}})


NO_KL = {"kl": {"weight": 0.0}}
GSPO = NO_KL | {"ratio": "sequence"}

CASES: dict[str, Case] = {
    "grpo": Case("grpo"),
    "grpo_no_kl": Case("grpo", NO_KL),
    "grpo_kl_is_corrected": Case("grpo", {"kl": {"estimator": "k3_corrected"}}),
    "grpo_population_std": Case("grpo", {"advantage": {"ddof": 0}}),
    "grpo_verl_default_dual_clip_token_mean": Case("grpo", {"aggregation": "token_mean"}),
    "grpo_kl_in_reward_k1": Case("grpo", {"kl": {"estimator": "k1", "place": "reward"}}),
    "grpo_multi_reward_sum_then_normalise": Case("dapo", {"advantage": {"eps": 1e-4}}),
    "on_policy_point": Case("grpo", NO_KL),
    "dr_grpo": Case("dr_grpo"),
    "dr_grpo_paper_equation": Case("dr_grpo", {"aggregation": "seq_mean_token_sum"}),
    "dapo": Case("dapo"),
    "dapo_dual_clip_c10": Case("dapo"),
    "dapo_paper_per_prompt": Case("dapo", {"aggregation": "prompt_mean_token_mean"}),
    "gdpo_paper": Case("gdpo", {"advantage": _gdpo(0.0, 1e-8)}),
    "gdpo_trl": Case("gdpo"),
    "gdpo_verl": Case("gdpo", {"advantage": _gdpo(1e-6, 1e-8, "token")}),
    "gdpo_nemo": Case("gdpo", {"advantage": _gdpo(1e-6, 0.0)}),
    "gdpo_trl_conditioned_reward": Case("gdpo"),
    "gspo_paper_clip": Case("grpo", GSPO),
    "gspo_wide_clip": Case("grpo", GSPO),
    "gspo_token": Case("grpo", GSPO | {"ratio": "sequence_token", "clip": {"low": 0.05, "high": 0.1}}),
    "kl_k1_as_loss": _only_kl("k1"),
    "kl_k2_as_loss": _only_kl("k2"),
    "kl_k3_as_loss": _only_kl("k3"),
    "kl_k3_plus_straight_through_k2": _only_kl("k3_plus"),
}


def stated(case: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides for the numbers that a case's own conventions state, e.g. clip "0.2/0.28 + dual clip c=10"."""
    says = {key: str(value) for key, value in case.get("conventions", {}).items()}
    found: dict[str, Any] = {}
    if pair := re.search(rf"({_NUMBER})\s*/\s*({_NUMBER})", says.get("clip", "")):
        found["clip"] = {"low": float(pair[1]), "high": float(pair[2])}
    if dual := re.search(rf"\bc=({_NUMBER})", says.get("clip", "")):
        found.setdefault("clip", {})["dual"] = float(dual[1])
    if eps := re.search(rf"\beps=({_NUMBER})", says.get("std", "")):
        found["advantage"] = {"eps": float(eps[1])}
    if weight := re.search(rf"\b(?:beta=|coef )({_NUMBER})", says.get("kl", "")):
        found["kl"] = {"weight": float(weight[1])}
    if batch := re.search(rf"\+({_NUMBER})", says.get("batch_norm", "")):
        found.setdefault("advantage", {})["batch_eps"] = float(batch[1])
    return found


_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


def build(name: str, case: Mapping[str, Any] | None = None, **overrides: Any) -> Objective:
    """The objective of a golden name: YAML, then this script's table, then what the case states, then `overrides`."""
    algorithm, changes = CASES[name] if name in CASES else Case(name)
    config = OmegaConf.load(ALGORITHMS / f"{algorithm}.yaml")
    if not isinstance(config, DictConfig):
        raise TypeError(f"{algorithm}.yaml is not a mapping")
    for change in (changes, stated(case or {}), overrides):
        for axis, value in change.items():
            whole = not isinstance(value, Mapping) or "name" in value
            config[axis] = value if whole else OmegaConf.merge(config[axis], value)
    return instantiate(config)


def check_case(name: str, case: Mapping[str, Any], inputs: Mapping[str, Any]) -> Errors:
    """Advantages, loss and gradient of one golden case."""
    objective = build(name, case)
    new_BT, batch, advantages_BT = make_batch(objective, case, inputs)
    if name == "on_policy_point":
        new_BT = _tensor(inputs["old"])
    new_BT.requires_grad_()
    output = objective.loss(new_BT, batch)
    (gradient_BT,) = torch.autograd.grad(output.loss, new_BT)
    expected = case.get("advantages")
    on_BT = batch.mask_BT > 0
    return Errors(
        None if expected is None else error(advantages_BT[on_BT], _per_token(_tensor(expected), on_BT)[on_BT]),
        error(output.loss.detach(), _tensor(case["loss"])),
        error(gradient_BT[on_BT], _tensor(case["grad_wrt_new_logprobs"])[on_BT]),
    )


def make_batch(
    objective: Objective, case: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[Tensor, PolicyBatch, Tensor]:
    """(new log-probs, the batch that training would see, advantages) in float64."""
    new_BT, old_BT, ref_BT, mask_BT = (_tensor(inputs[key]) for key in ("new", "old", "ref", "mask"))
    group_B = torch.tensor(inputs["groups"])
    rewards_BR = _tensor(case.get("conditioned_rewards", inputs["rewards"]))
    weights = re.search(r"\[([^\]]+)\]", str(case.get("conventions", {}).get("weights", "")))
    weights_R = _tensor([float(w) for w in weights[1].split(",")] if weights else inputs["weights"])
    advantages_BT = objective.advantages(
        rewards_BR, weights_R, group_B, mask_BT, old_logprobs_BT=old_BT, ref_logprobs_BT=ref_BT
    )
    if case.get("advantages", ...) is None:
        advantages_BT = torch.zeros_like(mask_BT)  # a case of the KL term alone
    length_B = mask_BT.sum(dim=1)
    ids_BT = torch.zeros_like(mask_BT, dtype=torch.long)
    batch = PolicyBatch(
        input_ids_BT=ids_BT,
        target_ids_BT=ids_BT,
        mask_BT=mask_BT,
        advantages_BT=advantages_BT,
        rollout_logprobs_BT=_tensor(inputs["rollout"]),
        group_tokens_B=torch.stack([length_B[group_B == group].sum() for group in group_B]),
        sequences_total=_tensor(len(group_B)),
        tokens_total=length_B.sum(),
        prompts_total=_tensor(len(group_B.unique())),
        max_completion=_tensor(case.get("l_max", mask_BT.shape[1])),
        old_logprobs_BT=old_BT,
        ref_logprobs_BT=ref_BT,
    )
    return new_BT, batch, advantages_BT


def check_collapse(data: Mapping[str, Any]) -> Errors:
    """GDPO's advantage-collapse example, and its counts of distinct groups, before the batch normalisation."""
    objectives = {
        "grpo": build("grpo", advantage=_norm(0.0)),
        "grpo_no_std": build("dr_grpo"),
        "gdpo": build("gdpo", advantage=_gdpo(0.0, 0.0, None)),
    }
    worst = 0.0
    examples = [*data["two_rollouts_two_binary_rewards"].values(), data["three_rollouts"]]
    for example in examples:
        for key, objective in objectives.items():
            expected = example.get("gdpo_before_batch_norm" if key == "gdpo" else key)
            if isinstance(expected, str):  # the three rollouts' "all zero (...)"
                expected = [0.0] * len(example["rewards"])
            if expected is not None:
                got_PG = _advantages(objective, _tensor(example["rewards"])[None])
                worst = max(worst, error(got_PG[0], _tensor(expected)))
    for size, counts in data["distinct_group_counts"].items():
        group, rewards = (int(number) for number in re.findall(r"\d+", size))
        vectors = list(itertools.product((0.0, 1.0), repeat=rewards))
        groups_PGR = _tensor(list(itertools.combinations_with_replacement(vectors, group)))
        for key, expected in counts.items():
            sorted_PG = _advantages(objectives[key], groups_PGR).sort(dim=1).values
            distinct = {tuple(row) for row in (sorted_PG * 1e6).round().long().tolist()}
            worst = max(worst, abs(len(distinct) - expected))
    return Errors(worst, None, None)


def _advantages(objective: Objective, groups_PGR: Tensor) -> Tensor:
    """Advantages (P, G) of many groups with unit weights."""
    prompts, group, rewards = groups_PGR.shape
    group_B = torch.arange(prompts).repeat_interleave(group)
    mask_BT = torch.ones(prompts * group, 1, dtype=torch.float64)
    weights_R = torch.ones(rewards, dtype=torch.float64)
    return objective.advantages(groups_PGR.flatten(0, 1), weights_R, group_B, mask_BT).view(prompts, group)


def error(got: Tensor, expected: Tensor) -> float:
    """Worst absolute difference / max(1, largest |expected|); infinite where anything is not finite."""
    worst = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
    return worst if worst == worst else float("inf")


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _per_token(values: Tensor, like_BT: Tensor) -> Tensor:
    return values if values.dim() == 2 else values[:, None].expand(like_BT.shape)


def main(argv: list[str] | None = None) -> int:
    """Check a folder, print a table; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="folder with objectives_main.json, batch_main.json, gdpo_collapse.json"
    )
    parser.add_argument("--subset", action="store_true", help="list what is not covered instead of failing for it")
    parser.add_argument("--objective", help="check this name only, e.g. gdpo_paper")
    args = parser.parse_args(argv)

    files = {path.name: json.loads(path.read_text()) for path in sorted(args.folder.glob("*.json"))}
    if not files:
        print(f"no .json files in {str(args.folder)!r}; valid: a folder such as tests/golden", file=sys.stderr)
        return 2
    golden = files.get("objectives_main.json", {"objectives": {}})
    names = [*golden["objectives"], *([COLLAPSE] if f"{COLLAPSE}.json" in files else [])]
    missing = [name for name in names if name != COLLAPSE and name not in CASES]
    missing += [name for name in files if name not in KNOWN_FILES]
    batch_file = golden.get("inputs_file", "batch_main.json")
    if golden["objectives"] and batch_file not in files:
        print(f"{args.folder} has objectives_main.json but not {batch_file}, the batch it refers to", file=sys.stderr)
        return 2
    if args.objective:
        if args.objective not in names:
            print(f"--objective: got {args.objective!r}; {nearest(args.objective, names)}", file=sys.stderr)
            return 2
        names = [args.objective]
        missing = [name for name in missing if name in names]

    results = {}
    for name in names:
        if name == COLLAPSE:
            results[name] = check_collapse(files[f"{COLLAPSE}.json"])
        elif name in CASES:
            results[name] = check_case(name, golden["objectives"][name], files[batch_file]["inputs"])
    return report(results, missing, args.subset)


def report(results: Mapping[str, Errors], missing: list[str], subset: bool) -> int:
    """Print the table and the verdict; the exit status."""
    table = Table("objective", *Errors._fields, "verdict", title="worst error")
    for name, errors in results.items():
        cells = ["-" if e is None else f"{e:.1e}" for e in errors]
        table.add_row(name, *cells, "ok" if errors.worst <= TOLERANCE else "WRONG")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    wrong = [name for name, errors in results.items() if errors.worst > TOLERANCE]
    print(f"{len(results) - len(wrong)} of {len(results)} agree within {TOLERANCE}")
    if wrong:
        print(f"wrong: {', '.join(wrong)}")
    if missing:
        print(f"{'left out' if subset else 'NOT COVERED (type --subset to leave them out)'}: {', '.join(missing)}")
    return int(bool(wrong) or not results or (bool(missing) and not subset))


if __name__ == "__main__":
    raise SystemExit(main())
