"""Every name of `objectives_main.json`: which YAML, what is changed in it, and its worst error.

Numbers that a case states itself (clip bounds, eps, KL weight, reward weights, L_max) are read from it and win over the
YAML and over this table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lit_reason.objectives import Objective
from lit_reason.rewards import conditioned
from lit_reason.types import PolicyBatch

_NUMBER = r"\d+(?:\.\d+)?(?:e[-+]?\d+)?"
L_MAX = 10  # the reference's generation limit, where a file states none
TOKEN_ADVANTAGES = "gspo_token_per_token_adv"  # one number per sequence times linspace(0.5, 1.5) over the padded length
# A number that a case leaves to another one of its file ("as above"), and where it stands there.
LEFT_TO = {
    "dr_grpo_verl_jan2026": ("dr_grpo", "l_max"),
    "gspo_token": ("gspo_wide_clip", "clip"),
    TOKEN_ADVANTAGES: ("gspo_wide_clip", "clip"),
    "reinforce_pp_verl": ("reinforce_pp_openrlhf", "kl"),
}
# Convention, pattern of a number in it, and the setting that it is.
STATED = (
    ("std", rf"(?:\beps=|\)\+)({_NUMBER})", "advantage", "eps"),
    ("norm", rf"\bvar[,+]({_NUMBER})", "advantage", "eps"),
    ("batch_norm", rf"\+({_NUMBER})", "advantage", "batch_eps"),
    ("clip", rf"({_NUMBER})\s*/\s*{_NUMBER}", "clip", "low"),
    ("clip", rf"{_NUMBER}\s*/\s*({_NUMBER})", "clip", "high"),
    ("clip", rf"\beps1=({_NUMBER})", "clip", "low"),
    ("clip", rf"\beps2=({_NUMBER})", "clip", "high"),
    ("clip", rf"\bc=({_NUMBER})", "clip", "dual"),
    ("clip", rf"\bcap ({_NUMBER})", "clip", "cap"),
    ("is_weight", rf"\bmin\(.*, ({_NUMBER})\)", "clip", "cap"),
    ("kl", rf"(?:\bbeta=|\bcoef |\bLOSS, )({_NUMBER})", "kl", "weight"),
    ("kl_penalty_coef", rf"({_NUMBER})", "kl", "weight"),
)
ALGORITHMS = Path(__file__).resolve().parents[2] / "conf" / "algorithm"


class Case(NamedTuple):
    """A golden name: which YAML, and what is changed in it. A mapping with `name` replaces the whole axis.

    `inputs` renames the batch's log-probs: `{"old": "rollout"}` takes the engine's as the sampling policy's.
    """

    algorithm: str
    overrides: dict[str, Any] = {}
    inputs: dict[str, str] = {}


class Errors(NamedTuple):
    """Worst absolute error, divided by max(1, largest expected value). None: the file states no such number."""

    advantages: float | None
    loss: float | None
    gradient: float | None

    @property
    def worst(self) -> float:
        return max((e for e in self if e is not None), default=float("inf"))


def group_norm(eps: float, ddof: int = 1) -> dict[str, Any]:
    return {"name": "group_norm", "eps": eps, "ddof": ddof}


def gdpo(eps: float, batch_eps: float, batch_norm: str | None = "sequence") -> dict[str, Any]:
    return {"name": "gdpo", "eps": eps, "ddof": 1, "batch_norm": batch_norm, "batch_eps": batch_eps}


def _only_kl(term: str) -> Case:
    return Case("grpo", {"aggregation": "token_mean"} | _kl(term, 1.0))


def _kl(term: str, weight: float = 0.0) -> dict[str, Any]:
    """The whole axis; the weight that a case states wins."""
    return {"kl": {"name": term, "weight": weight}}


def _cispo(cap: float, floor: float | None = None) -> dict[str, Any]:
    return {"clip": {"name": "cispo", "floor": floor, "cap": cap}}


def _distill(aggregation: str, clip: Any) -> Case:
    """The sampler is the engine's policy; the teacher takes the reference's place."""
    changes = {
        "advantage": {"name": "distill", "discount": 0.0},
        **_kl("k1_token_reward", 1.0),
    }
    return Case("dapo", changes | {"aggregation": aggregation, "clip": clip}, {"old": "rollout", "ref": "teacher"})


def _rpg(divergence: str, name: str, **settings: Any) -> Case:
    return Case("rpg", {"clip": {"name": name, "divergence": divergence, "beta": 0.02} | settings})


NO_KL = {"kl": {"weight": 0.0}}
WIDE_GSPO = {"clip": {"low": 0.05, "high": 0.1}}
PPO_CLIP = {"name": "ppo", "low": 0.2, "high": 0.2, "dual": None}
RLOO_KL = {"kl": {"weight": 0.05}}
RPG_BOUNDS = {"low": 0.2, "high": 0.28, "dual": 10.0}
RPG = {
    "FKL": "forward",
    "UFKL": "forward_unnormalised",
    "RKL": "reverse",
    "URKL": "reverse_unnormalised",
}

CASES: dict[str, Case] = {
    "reinforce_batch_mean_baseline": Case("reinforce"),
    "reinforce_group_mean_baseline": Case("reinforce", {"advantage": "group_mean"}),
    "reinforce_bypass_tis_token": Case(
        "cispo", {"aggregation": "seq_mean_token_sum"} | _cispo(2.0), {"old": "rollout"}
    ),
    "rloo_reinforce": Case("rloo", RLOO_KL),
    "rloo_trl_sequence_ratio_clip": Case(
        "rloo", RLOO_KL | {"ratio": "sequence_product", "clip": PPO_CLIP, "aggregation": "seq_mean_token_mean"}
    ),
    "reinforce_pp_openrlhf": Case("reinforce_pp"),
    "reinforce_pp_verl": Case("reinforce_pp", {"advantage": {"eps_rule": "add", "ddof": 1}}),
    "reinforce_pp_baseline_openrlhf_k2": Case("reinforce_pp_baseline"),
    "grpo_batch_std": Case("lite_ppo"),
    "grpo_tis_token": Case("grpo"),
    "grpo_mis_token_icepop": Case("grpo"),
    "grpo_tis_sequence": Case("grpo"),
    "grpo_mis_sequence": Case("grpo"),
    "grpo_mis_geometric": Case("grpo"),
    "grpo": Case("grpo"),
    "grpo_no_kl": Case("grpo", NO_KL),
    "grpo_kl_is_corrected": Case("grpo", _kl("k3_is_corrected", 0.04)),
    "grpo_population_std": Case("grpo", {"advantage": {"ddof": 0}}),
    "grpo_verl_default_dual_clip_token_mean": Case("grpo", {"aggregation": "token_mean"}),
    "grpo_kl_in_reward_k1": Case("grpo", _kl("k1_reward")),
    "grpo_multi_reward_sum_then_normalise": Case("dapo", {"advantage": {"eps": 1e-4}}),
    "on_policy_point": Case("grpo", NO_KL, {"new": "old"}),
    "dr_grpo": Case("dr_grpo"),
    "dr_grpo_paper_equation": Case("dr_grpo", {"aggregation": "seq_mean_token_sum"}),
    "dr_grpo_verl_jan2026": Case("dr_grpo", {"aggregation": "token_sum_over_max"}),
    "dapo": Case("dapo"),
    "dapo_dual_clip_c10": Case("dapo"),
    "dapo_paper_per_prompt": Case("dapo", {"aggregation": "prompt_mean_token_mean"}),
    "gdpo_paper": Case("gdpo", {"advantage": gdpo(0.0, 1e-8)}),
    "gdpo_trl": Case("gdpo"),
    "gdpo_verl": Case("gdpo", {"advantage": gdpo(1e-6, 1e-8, "token")}),
    "gdpo_nemo": Case("gdpo", {"advantage": gdpo(1e-6, 0.0)}),
    "gdpo_trl_conditioned_reward": Case("gdpo"),
    "gspo_paper_clip": Case("gspo"),
    "gspo_wide_clip": Case("gspo"),
    "gspo_token": Case("gspo", WIDE_GSPO | {"ratio": "sequence_token"}),
    TOKEN_ADVANTAGES: Case("gspo", WIDE_GSPO | {"ratio": "sequence_token"}),
    "cispo_paper": Case("cispo", _cispo(1.28)),
    "cispo_trl_eps_high_5": Case("cispo"),
    "cispo_verl_two_sided": Case("cispo", _cispo(1.2, floor=0.8)),
    "opd_tinker_importance_sampling": _distill("token_sum", "none"),
    "opd_token_mean_ppo_clip": _distill("token_mean", PPO_CLIP),
    "kl_k1_as_loss": _only_kl("k1_loss"),
    "kl_k2_as_loss": _only_kl("k2_loss"),
    "kl_k3_as_loss": _only_kl("k3_loss"),
    "kl_k3_plus_straight_through_k2": _only_kl("k3_plus_loss"),
}
for _short, _divergence in RPG.items():
    CASES |= {
        f"rpg_{_short}_fully_differentiable": _rpg(_divergence, "rpg", style="differentiable"),
        f"rpg_{_short}_reinforce_style": _rpg(_divergence, "rpg", style="reinforce"),
        f"rpg_{_short}_style_clip_alg2": _rpg(_divergence, "rpg_clip", **RPG_BOUNDS),
        f"rpg_{_short}_dual_clip_secG2": _rpg(_divergence, "rpg_dual_clip", **RPG_BOUNDS),
    }


def complete(name: str, cases: Mapping[str, Any]) -> dict[str, Any]:
    """The case `name` of a file with what it leaves to another."""
    case = {**cases[name], "conventions": dict(cases[name].get("conventions", {}))}
    other, key = LEFT_TO.get(name, ("", ""))
    there = cases.get(other, {})
    if key in there:
        case[key] = there[key]
    elif key in there.get("conventions", {}):
        case["conventions"][key] = there["conventions"][key]
    return case


def stated(case: Mapping[str, Any], algorithm: str = "") -> dict[str, Any]:
    """Overrides for the numbers that a case's own conventions state, e.g. clip "0.2/0.28 + dual clip c=10"."""
    says = {key: str(value) for key, value in case.get("conventions", {}).items()}
    found: dict[str, Any] = {}
    for convention, pattern, axis, setting in STATED:
        if number := re.search(pattern, says.get(convention, "")):
            found.setdefault(axis, {})[setting] = float(number[1])
    clip = says.get("clip", "")
    if high := re.search(rf"\beps_high=({_NUMBER})", clip):
        found["clip"] = {"cap": 1 + float(high[1])}
    if both := re.search(rf"\bclamp\(1-({_NUMBER}), 1\+({_NUMBER})\)", clip):
        found["clip"] = {"floor": 1 - float(both[1]), "cap": 1 + float(both[2])}
    if "beta" in says:
        axis, setting = ("clip", "beta") if algorithm == "rpg" else ("kl", "weight")
        found.setdefault(axis, {})[setting] = float(says["beta"])
    if cut := re.match(rf"(\w+)_(truncate|mask), C_max=({_NUMBER}), C_min=({_NUMBER}|None)", says.get("is_weight", "")):
        low = {} if cut[2] == "truncate" else {"low": None if cut[4] == "None" else float(cut[4])}
        level = "geometric" if cut[1] == "geo" else cut[1]
        found["correction"] = {"name": cut[2], "level": level, "high": float(cut[3])} | low
    return found


def build(name: str, case: Mapping[str, Any] | None = None, **overrides: Any) -> Objective:
    """The objective of a golden name: YAML, then this script's table, then what the case states, then `overrides`."""
    algorithm, changes, _ = CASES.get(name, Case(name))
    config = OmegaConf.load(ALGORITHMS / f"{algorithm}.yaml")
    if not isinstance(config, DictConfig):
        raise TypeError(f"{algorithm}.yaml is not a mapping")
    for change in (changes, stated(case or {}, algorithm), overrides):
        for axis, value in change.items():
            whole = not isinstance(value, Mapping) or "name" in value
            config[axis] = value if whole else OmegaConf.merge(config[axis], value)
    return instantiate(config)


def check_case(name: str, case: Mapping[str, Any], inputs: Mapping[str, Any]) -> Errors:
    """Advantages, loss and gradient of one golden case, `complete`d."""
    objective = build(name, case)
    renamed = {**inputs, **{key: inputs[other] for key, other in CASES[name].inputs.items()}}
    new_BT, batch, advantages_BT = make_batch(objective, case, renamed)
    if name == TOKEN_ADVANTAGES:
        advantages_BT = advantages_BT * torch.linspace(0.5, 1.5, advantages_BT.shape[1], dtype=torch.float64)
        batch.advantages_BT = advantages_BT
    new_BT.requires_grad_()
    output = objective.loss(new_BT, batch)
    (gradient_BT,) = torch.autograd.grad(output.loss, new_BT)
    expected = case.get("advantages")
    on_BT = batch.mask_BT > 0
    return Errors(
        None if expected is None else error(advantages_BT[on_BT], _per_token(tensor(expected), on_BT)[on_BT]),
        error(output.loss.detach(), tensor(case["loss"])),
        error(gradient_BT[on_BT], tensor(case["grad_wrt_new_logprobs"])[on_BT]),
    )


def make_batch(
    objective: Objective, case: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[Tensor, PolicyBatch, Tensor]:
    """(new log-probs, the batch that training would see, advantages) in float64."""
    new_BT, old_BT, ref_BT, mask_BT = (tensor(inputs[key]) for key in ("new", "old", "ref", "mask"))
    group_B = torch.tensor(inputs["groups"])
    rewards_BR = tensor(inputs["rewards"])
    says = case.get("conventions", {})
    if rule := re.match(rf"r_(\d+) := r_\d+ if r_(\d+) >= ({_NUMBER})", says.get("conditioned", "")):
        kept, on = int(rule[1]) - 1, int(rule[2]) - 1
        rewards_BR[:, kept] = conditioned(rewards_BR[:, kept], rewards_BR[:, on], at_least=float(rule[3]))
    weights = re.search(r"\[([^\]]+)\]", str(says.get("weights", "")))
    weights_R = tensor([float(w) for w in weights[1].split(",")] if weights else inputs["weights"])
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
        rollout_logprobs_BT=tensor(inputs["rollout"]),
        group_tokens_B=torch.stack([length_B[group_B == group].sum() for group in group_B]),
        sequences_total=tensor(len(group_B)),
        tokens_total=length_B.sum(),
        prompts_total=tensor(len(group_B.unique())),
        max_completion=tensor(case.get("l_max", L_MAX)),
        old_logprobs_BT=old_BT,
        ref_logprobs_BT=ref_BT,
    )
    return new_BT, batch, advantages_BT


def error(got: Tensor, expected: Tensor) -> float:
    """Worst absolute difference / max(1, largest |expected|); infinite where anything is not finite."""
    worst = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
    return worst if worst == worst else float("inf")


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _per_token(values: Tensor, like_BT: Tensor) -> Tensor:
    return values if values.dim() == 2 else values[:, None].expand(like_BT.shape)
