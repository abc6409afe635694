"""The files of reference numbers beside `objectives_main.json`, part by part.

Every function takes a file's content and the shared batch, and returns `{name: Errors}`; nothing is compared with the
fields that are finite differences (their exact twins are).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from golden.cases import Errors, build, error, gdpo, group_norm, make_batch, stated, tensor
from lit_reason.modules.logprobs import chosen_logprobs
from lit_reason.objectives import (
    AGGREGATIONS,
    CLIPS,
    CORRECTIONS,
    KL_TERMS,
    RATIOS,
    Objective,
    gae,
    generalised_jsd,
    informative,
    value_loss,
)
from lit_reason.objectives.correction import log_ratio
from lit_reason.objectives.statistics import whiten
from lit_reason.rewards import Length
from lit_reason.types import Completion, Prompt

Data = Mapping[str, Any]

AGGREGATION_NAMES = {
    "seq-mean-token-mean": "seq_mean_token_mean",
    "token-mean": "token_mean",
    "prompt-mean-token-mean": "prompt_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "token_sum_norm",
    "token-sum-over-lmax": "token_sum_over_max",
    "token-sum": "token_sum",
}
EDGE_CLIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo_0.2": ("ppo", {"low": 0.2, "high": 0.2, "dual": None}),
    "dapo_0.2_0.28": ("ppo", {"low": 0.2, "high": 0.28, "dual": None}),
    "dual_clip_c3": ("ppo", {"low": 0.2, "high": 0.2, "dual": 3.0}),
    "dual_clip_c10": ("ppo", {"low": 0.2, "high": 0.28, "dual": 10.0}),
    "cispo_1.28": ("cispo", {"floor": None, "cap": 1.28}),
    "cispo_trl_5": ("cispo", {"floor": None, "cap": 5.0}),
    "cispo_verl_0.8_1.2": ("cispo", {"floor": 0.8, "cap": 1.2}),
    "rpg_style_clip_URKL_beta0.02_c10": (
        "rpg_clip",
        {"divergence": "reverse_unnormalised", "beta": 0.02, "low": 0.2, "high": 0.28, "dual": 10.0},
    ),
}
# The estimators of zero_one_view.json; `{k}` is the case's k.
BINARY: dict[str, Any] = {
    "reinforce": {"name": "reinforce", "baseline": None},
    "group_mean": "group_mean",
    "rloo": "rloo",
    "grpo_pop": group_norm(0.0, 0),
    "grpo_sample": group_norm(0.0, 1),
    "rejection": {"name": "maxrl", "eps": 0.0, "baseline": None},
    "maxrl": {"name": "maxrl", "eps": 0.0, "baseline": "group_mean"},
    "pkpo": {"name": "pkpo", "threshold": 1.0, "baseline": None},
    "pkpo_loo_minus_one": {"name": "pkpo", "threshold": 1.0, "baseline": "leave_one_out_minus_one"},
    "passk_training": {"name": "passk", "threshold": 1.0},
}


def check_collapse(data: Mapping[str, Any]) -> Errors:
    """GDPO's advantage-collapse example, and its counts of distinct groups, before the batch normalisation."""
    objectives = {
        "grpo": build("grpo", advantage=group_norm(0.0)),
        "grpo_no_std": build("dr_grpo"),
        "gdpo": build("gdpo", advantage=gdpo(0.0, 0.0, None)),
    }
    worst = 0.0
    examples = [*data["two_rollouts_two_binary_rewards"].values(), data["three_rollouts"]]
    for example in examples:
        for key, objective in objectives.items():
            expected = example.get("gdpo_before_batch_norm" if key == "gdpo" else key)
            if isinstance(expected, str):  # the three rollouts' "all zero (...)"
                expected = [0.0] * len(example["rewards"])
            if expected is not None:
                got_PG = _advantages(objective, tensor(example["rewards"])[None])
                worst = max(worst, error(got_PG[0], tensor(expected)))
    for size, counts in data["distinct_group_counts"].items():
        group, rewards = (int(number) for number in re.findall(r"\d+", size))
        vectors = list(itertools.product((0.0, 1.0), repeat=rewards))
        groups_PGR = tensor(list(itertools.combinations_with_replacement(vectors, group)))
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


def check_edges(data: Data, inputs: Data) -> dict[str, Errors]:
    """Groups without signal or of one row, empty rows, clip edges, aggregations, missing engine log-probs.

    Not compared are the numbers of what is done otherwise here: verl's groups of one, overlong without a floor and
    inverted k1 bounds, float32 means without a guard, and naive means of micro-batches.
    """
    cases = data["cases"]
    found = {
        "zero_std_groups": _zero_std(cases["zero_std_groups"], inputs),
        "zero_std_groups.keep": _kept(cases["zero_std_groups"], "rewards", "dynamic_sampling_keep"),
        "dapo_dynamic_sampling": _kept(cases["dapo_dynamic_sampling"], "accuracy", "keep"),
        "group_of_one": _group_of_one(cases["group_of_one"]),
        "fully_masked_sequence": _fully_masked(cases["fully_masked_sequence"], cases["aggregation"]["l_max"], inputs),
        "clip_edges": _clip_edges(cases["clip_edges"]["cases"]),
        "aggregation": _aggregation(cases["aggregation"], inputs),
        "dapo_soft_overlong": _soft_overlong(cases["dapo_soft_overlong"]),
        "missing_rollout_logprob": _missing_rollout(cases["missing_rollout_logprob"]),
        "verl_token_k1_bounds": _documented_bounds(cases["verl_token_k1_bounds"]),
    }
    for name in cases:
        size = re.fullmatch(r"float32_equal_rewards_G(\d+)", name)
        if not size:
            continue
        rewards_PG1 = torch.full((1, int(size[1]), 1), 0.1, dtype=torch.float32)
        worst = max(
            float(_advantages(build("grpo", advantage=group_norm(e)), rewards_PG1).abs().max()) for e in (0, 1e-9)
        )
        found[name] = Errors(worst, None, None)  # with the guard the answer is 0, whatever eps
    return {f"edge_cases.{name}": errors for name, errors in found.items()}


def _zero_std(case: Data, inputs: Data) -> Errors:
    mask_BT, group_B = tensor(inputs["mask"]), torch.tensor(case["groups"])
    tokens = {"name": "reinforce_pp_baseline", "eps": 1e-8, "eps_rule": "floor", "ddof": 0}
    settings = {
        "grpo_eps1e4": group_norm(1e-4),
        "rloo": "rloo",
        "dr_grpo": "group_mean",
        "gdpo_trl": gdpo(1e-4, 1e-4),
        "gdpo_verl_tokens": gdpo(1e-6, 1e-8, "token"),
        "rfpp_baseline_tokens": tokens,
    }
    worst = 0.0
    for key, advantage in settings.items():
        columns = 2 if key.startswith("gdpo") else 1
        rewards_BR = tensor(case["rewards"])[:, None].expand(-1, columns)
        got_BT = build("grpo", advantage=advantage).advantages(
            rewards_BR, torch.ones(columns, dtype=torch.float64), group_B, mask_BT
        )
        expected = tensor(case[key])
        expected_BT = expected if expected.dim() == 2 else expected[:, None].expand(mask_BT.shape)
        worst = max(worst, error(got_BT * mask_BT, expected_BT * mask_BT))
    return Errors(worst, None, None)


def _kept(case: Data, rewards: str, keep: str) -> Errors:
    """With one column the sum and the columns agree."""
    group_B = torch.tensor(case["groups"])
    expected_B = tensor(case[keep])[group_B]
    one_R, valid_B = torch.ones(1, dtype=torch.float64), torch.ones_like(group_B, dtype=torch.bool)
    worst = 0.0
    for per_reward in (False, True):
        got_B = informative(tensor(case[rewards])[:, None], one_R, group_B, valid_B, per_reward=per_reward)
        worst = max(worst, error(got_B.double(), expected_B))
    return Errors(worst, None, None)


def _group_of_one(case: Data) -> Errors:
    worst = 0.0
    norm = group_norm(1e-4)
    for key, advantage in (("recommended_grpo", norm), ("trl_grpo", norm), ("recommended_rloo", "rloo")):
        got_BT = build("grpo", advantage=advantage).advantages(
            tensor(case["rewards"])[:, None],
            torch.ones(1, dtype=torch.float64),
            torch.tensor(case["groups"]),
            torch.ones(len(case["rewards"]), 1, dtype=torch.float64),
        )
        worst = max(worst, error(got_BT[:, 0], tensor(case[key])))
    return Errors(worst, None, None)


def _fully_masked(case: Data, l_max: float, inputs: Data) -> Errors:
    masked = {**inputs, "mask": case["mask"]}
    empty_rows = sum(not any(row) for row in case["mask"])
    worst = Errors(0.0, 0.0, 0.0)
    for key, expected in (case["results"] | {"gspo": case["gspo"]}).items():
        aggregation, _, empty = key.partition("|")
        wide = {"name": "ppo", "low": 0.05, "high": 0.1, "dual": None}
        objective = build("gspo", clip=wide) if key == "gspo" else build("dapo", clip={"high": 0.2})
        if key != "gspo":
            objective = build(
                "dapo", advantage=group_norm(1e-4), clip={"high": 0.2}, aggregation=AGGREGATION_NAMES[aggregation]
            )
        new_BT, batch, advantages_BT = make_batch(objective, {"l_max": l_max}, masked)
        batch.sequences_total = batch.sequences_total - empty_rows * (empty == "drop")
        loss = objective.loss(new_BT.requires_grad_(), batch).loss
        (gradient_BT,) = torch.autograd.grad(loss, new_BT)
        got = Errors(
            error(advantages_BT[:, 0], tensor(expected["advantages"])),
            error(loss.detach(), tensor(expected["loss"])),
            error(gradient_BT, tensor(expected["grad_wrt_new_logprobs"])),
        )
        worst = _worst(worst, got)
        if key == "gspo":
            on_B = batch.mask_BT.any(dim=1)
            ratio_BT = RATIOS["sequence"](new_BT.detach(), tensor(inputs["old"]), batch.mask_BT)
            flows_B = (gradient_BT != 0).any(dim=1).double()
            worst = _worst(worst, Errors(None, error(ratio_BT[:, 0], tensor(expected["sequence_ratio"])), None))
            worst = _worst(worst, Errors(None, None, error(flows_B[on_B], tensor(expected["gradient_flows"])[on_B])))
    return worst


def _clip_edges(cases: list[Data]) -> Errors:
    worst = Errors(None, 0.0, 0.0)
    one_BT = torch.ones(1, 1, dtype=torch.float64)
    for case in cases:
        for key, (name, settings) in EDGE_CLIPS.items():
            new_BT = (-3 * one_BT + math.log(case["ratio"])).requires_grad_()
            ratio_BT = RATIOS["token"](new_BT, -3 * one_BT, one_BT)
            loss = CLIPS[name](ratio_BT, case["A"] * one_BT, new_BT, one_BT, **settings).loss_BT.sum()
            (gradient_BT,) = torch.autograd.grad(loss, new_BT)
            # The reference gives RPG's clip no value: it differs by constants between its versions.
            value = None if "loss" not in case[key] else error(loss.detach(), tensor(case[key]["loss"]))
            worst = _worst(worst, Errors(None, value, error(gradient_BT.sum(), tensor(case[key]["grad"]))))
    return worst


def _aggregation(case: Data, inputs: Data) -> Errors:
    """Through -r A with r = 1 and A = -l; the reference's naive means of micro-batches are another objective."""
    worst = 0.0
    given = {**inputs, "mask": case["mask"], "new": inputs["old"]}
    expected = case["value"] | {
        "token-mean ": case["microbatch"]["token_mean_global"],
        "seq-mean-token-mean ": case["microbatch"]["seq_mean_global"],
    }
    for key, value in expected.items():
        objective = build("reinforce", clip="none", aggregation=AGGREGATION_NAMES[key.strip()])
        new_BT, batch, _ = make_batch(objective, case, given)
        batch.advantages_BT = -tensor(case["per_token_loss"])
        worst = max(worst, error(objective.loss(new_BT, batch).loss, tensor(value)))
    assert set(AGGREGATION_NAMES.values()) == set(AGGREGATIONS)
    return Errors(None, worst, None)


def _soft_overlong(case: Data) -> Errors:
    reward = Length(max_tokens=case["L_max"], buffer=case["L_cache"], inside=0.0, outside=-1.0)
    prompt = Prompt("", "", "", "")
    got = [reward.score(prompt, Completion("", 0, (0,) * n, (), "", "stop", 0, 0)) for n in case["lengths"]]
    return Errors(error(tensor(got), tensor(case["paper"])), None, None)


def _missing_rollout(case: Data) -> Errors:
    difference_BT = tensor([[float(x) for x in case["old_minus_rollout"]]])
    old_BT, ones_BT = difference_BT.nan_to_num(), torch.ones_like(difference_BT)
    log_rho_BT = log_ratio(old_BT, difference_BT - difference_BT, ones_BT)  # NaN stays NaN
    worst = 0.0
    for level in ("token", "sequence"):
        expected = tensor(case[f"{level}_ratio"]).expand(old_BT.shape)
        got = CORRECTIONS["truncate"](log_rho_BT, ones_BT, level=level, high=math.inf)
        worst = max(worst, error(got.weights_BT, expected))
    return Errors(None, worst, None)


def _documented_bounds(case: Data) -> Errors:
    log_rho_BT = tensor([case["rho"]]).log()
    got = CORRECTIONS["mask"](
        log_rho_BT, torch.ones_like(log_rho_BT), level="token", low=case["lower"], high=case["upper"]
    )
    return Errors(None, error((~got.cut_BT[0]).double(), tensor(case["documented_keep"]).double()), None)


def check_zero_one(data: Data, inputs: Data) -> dict[str, Errors]:
    """h'(p) = E_S [A(correct) - A(wrong)] by enumerating the number S of other successes, and two groups by hand."""
    found: dict[str, Errors] = {}
    for key, expected in data["hprime"].items():
        name, _, sizes = key.partition("|")
        size, *k = (int(number) for number in re.findall(r"=(\d+)", sizes))
        A_CG = _binary(name, k, [[1.0] * c + [0.0] * (size - c) for c in range(size + 1)])
        others = torch.arange(size, dtype=torch.float64)
        gain_S = A_CG[1:, 0] - A_CG[:-1, -1]
        binomial_S = tensor([math.comb(size - 1, s) for s in range(size)])
        got = [float((binomial_S * p**others * (1 - p) ** (size - 1 - others) * gain_S).sum()) for p in data["p"]]
        found[name] = _worst(
            found.get(name, Errors(0.0, None, None)), Errors(error(tensor(got), tensor(expected)), None, None)
        )
    example = data["example_group_n8_c2"]
    for key, expected in example.items():
        if key not in ("rewards", "note"):
            name, _, k = re.fullmatch(r"(.*?)(_k(\d+))?", key).groups()  # type: ignore[union-attr]
            got = _binary(name, [] if k is None else [int(k)], [example["rewards"]])[0]
            found[name] = _worst(
                found.get(name, Errors(0.0, None, None)), Errors(error(got, tensor(expected)), None, None)
            )
    for name, expected in data["all_fail"].items():
        got = _binary(name, [], [[0.0] * len(expected)])[0]
        found[name] = _worst(found[name], Errors(error(got, tensor(expected)), None, None))
    return {f"zero_one_view.{name}": errors for name, errors in found.items()}


def _binary(name: str, k: list[int], groups: list[list[float]]) -> Tensor:
    advantage = BINARY[name] | {"k": k[0]} if k else BINARY[name]
    return _advantages(build("grpo", advantage=advantage), tensor(groups)[:, :, None])


def check_kl(data: Data, inputs: Data) -> dict[str, Errors]:
    """Exact enumeration over a vocabulary of five: KL estimators, RPG, entropy, generalised JSD."""
    theta = tensor(data["theta"]).requires_grad_()
    log_p, log_ref, log_old = theta.log_softmax(0), tensor(data["theta_ref"]).log_softmax(0), tensor(data["theta_old"])
    p, log_old = log_p.detach().exp(), log_old.log_softmax(0)
    old, ratio = log_old.exp(), (log_p - log_old).exp()

    def gradient(value: Tensor, expected: Any) -> float:
        (got,) = torch.autograd.grad(value, theta, retain_graph=True)
        return error(got, tensor(expected))

    found: dict[str, Errors] = {}
    for name, case in data["on_policy"].items():
        kl = KL_TERMS[f"{name}_loss"].estimator(log_p, log_ref, torch.ones_like(p))
        value = error((p * kl).sum().detach(), tensor(case["expected_value"]))
        in_reward = gradient((p * kl.detach() * log_p).sum(), data["in_reward"][name]["expected_gradient"])
        as_loss = gradient((p * kl).sum(), case["expected_gradient_as_loss"])
        found[name] = Errors(None, value, max(as_loss, in_reward))
    terms = {name: term.estimator(log_p, log_ref, ratio) for name, term in KL_TERMS.items()}
    sampled = {
        "k3_plain (GRPO)": terms["k3_loss"],
        "r*k3 differentiable (V3.2 / RPG corrected)": terms["k3_is_corrected"],
        "sg(r)*k3": terms["k3_is_loss"],
        "sg(r)*k2": terms["k2_is_loss"],
    }
    cases = data["off_policy_samples_from_old"]
    off = max(gradient((old * sampled[key]).sum(), case["expected_gradient"]) for key, case in cases.items())
    found["off_policy"] = Errors(None, None, off)
    found["rpg_exact"] = Errors(None, None, _rpg_exact(data["rpg_exact"], log_p, ratio, old, gradient))

    entropy = data["entropy"]
    value, surprise = chosen_logprobs(theta[None], torch.tensor([0]), 1.0)[1][0], -(p * log_p).sum()
    found["entropy"] = Errors(
        None,
        error(value.detach(), tensor(entropy["value"])),
        max(
            gradient(value, entropy["grad_wrt_logits"]),
            gradient(surprise, entropy["sampled_minus_logp"]["expected_gradient"]),
        ),
    )
    gkd, student = data["gkd"], tensor(data["gkd"]["student_logits"]).requires_grad_()
    found["gkd"] = Errors(None, 0.0, 0.0)
    for key, case in gkd["results"].items():
        loss = generalised_jsd(student, tensor(gkd["teacher_logits"]), beta=float(key.removeprefix("beta=")))
        (got,) = torch.autograd.grad(loss, student)
        worst = error(loss.detach(), tensor(case["loss"])), error(got, tensor(case["grad_wrt_student_logits"]))
        found["gkd"] = _worst(found["gkd"], Errors(None, *worst))
    return {f"kl_entropy_gkd.{name}": errors for name, errors in found.items()}


def _rpg_exact(
    case: Data, log_p: Tensor, ratio: Tensor, old: Tensor, gradient: Callable[[Tensor, Any], float]
) -> float:
    """Both styles against the exact gradient of J; `minus`, because the losses are minimised."""
    names = {"FKL": "forward", "RKL": "reverse", "UFKL": "forward_unnormalised", "URKL": "reverse_unnormalised"}
    worst = 0.0
    for short, style in itertools.product(names, ("differentiable", "reinforce")):
        settings = {"divergence": names[short], "beta": case["beta"], "style": style}
        loss = CLIPS["rpg"](ratio, tensor(case["reward"]), log_p, torch.ones_like(old), **settings).loss_BT
        worst = max(worst, gradient(-(old * loss).sum(), case["results"][short]["estimator"]))
    return worst


def check_critic(data: Data, inputs: Data) -> dict[str, Errors]:
    """GAE, the policy loss on its whitened advantages, and the clipped value loss."""
    mask_BT, values_BT, old_BT, ref_BT, vpred_BT = (
        tensor(inputs[key]) for key in ("mask", "values", "old", "ref", "vpred")
    )
    last_B = mask_BT.sum(1).long() - 1
    reward_BT = torch.zeros_like(mask_BT)
    reward_BT[torch.arange(len(last_B)), last_B] = tensor(inputs["reward"])
    found: dict[str, Errors] = {}
    for key, case in data["cases"].items():
        if key == "mask_with_hole":
            found |= {f"{key}.{holes}": _holes(case, values_BT, holes) for holes in ("skip", "zero")}
            continue
        gamma, lam = (float(number) for number in re.findall(r"[\d.]+", key))
        policy = case["policy"]
        tokens_BT = reward_BT - stated(policy)["kl"]["weight"] * (old_BT - ref_BT) * mask_BT  # k1 to the reference
        raw_BT, returns_BT = gae(tokens_BT, values_BT, mask_BT, gamma=gamma, lam=lam, holes="skip")
        objective = build("grpo", aggregation="token_mean", kl={"weight": 0.0})
        new_BT, batch, _ = make_batch(objective, policy, inputs)
        batch.advantages_BT = whiten(raw_BT, mask_BT, eps=1e-8, ddof=1)
        loss = objective.loss(new_BT.requires_grad_(), batch).loss
        (gradient_BT,) = torch.autograd.grad(loss, new_BT)
        pairs = {"raw_advantages": raw_BT, "returns": returns_BT, "advantages": batch.advantages_BT}
        found[f"{key}.policy"] = Errors(
            max(error(got_BT * mask_BT, tensor(policy[name]) * mask_BT) for name, got_BT in pairs.items()),
            error(loss.detach(), tensor(policy["loss"])),
            error(gradient_BT, tensor(policy["grad_wrt_new_logprobs"])),
        )
        found[f"{key}.value_loss"] = Errors(None, 0.0, 0.0)
        for bound, expected in case["value_loss"].items():
            clip = bound.removeprefix("cliprange_")
            vpred_BT.requires_grad_()
            loss_BT = value_loss(vpred_BT, values_BT, returns_BT, clip=None if clip == "None" else float(clip))
            value = (loss_BT * mask_BT).sum() / mask_BT.sum()
            (gradient_BT,) = torch.autograd.grad(value, vpred_BT)
            got = (
                error(value.detach(), tensor(expected["loss"])),
                error(gradient_BT, tensor(expected["grad_wrt_vpred"])),
            )
            found[f"{key}.value_loss"] = _worst(found[f"{key}.value_loss"], Errors(None, *got))
    return {f"ppo_critic.{name}": errors for name, errors in found.items()}


def _holes(case: Data, values_BT: Tensor, holes: str) -> Errors:
    got = gae(
        tensor(case["token_rewards"]),
        values_BT,
        tensor(case["mask"]),
        gamma=1.0,
        lam=0.95,
        holes=holes,  # type: ignore[arg-type]
    )
    expected = (case[holes][key] for key in ("advantages", "returns"))
    mask_BT = tensor(case["mask"])
    return Errors(max(error(a * mask_BT, tensor(b) * mask_BT) for a, b in zip(got, expected, strict=True)), None, None)


def _worst(a: Errors, b: Errors) -> Errors:
    return Errors(*(max((e for e in pair if e is not None), default=None) for pair in zip(a, b, strict=True)))


FILES: dict[str, Callable[[Data, Data], dict[str, Errors]]] = {
    "gdpo_collapse.json": lambda data, _: {"gdpo_collapse": check_collapse(data)},
    "edge_cases.json": check_edges,
    "kl_entropy_gkd.json": check_kl,
    "ppo_critic.json": check_critic,
    "zero_one_view.json": check_zero_one,
}
