"""One policy-gradient objective: a choice on each of five axes.

    B sequences   T tokens   R rewards

    rewards_BR --advantage--> advantages_BT --.
    new, old log-probs --ratio--> ratio_BT ---+--clip--> loss_BT --(+ weight * KL_BT)--aggregation--> loss
    (old, engine's log-probs --correction--> weights_BT, times what the clip returns)

GRPO, DAPO, GDPO and their like are `conf/algorithm/*.yaml`, nothing else: any mixture of the axes is as good.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_reason.errors import ConfigError, NonFiniteError
from lit_reason.objectives.advantage import ADVANTAGES, min_group_size
from lit_reason.objectives.aggregation import AGGREGATIONS
from lit_reason.objectives.choices import check_value, resolve
from lit_reason.objectives.clip import CLIPS
from lit_reason.objectives.correction import CORRECTIONS, correction_metrics, log_ratio
from lit_reason.objectives.kl import resolve_kl
from lit_reason.objectives.metrics import kl_metrics, masked_mean, mismatch_metrics, ratio_metrics
from lit_reason.objectives.ratio import RATIOS
from lit_reason.types import PolicyBatch


@dataclass(slots=True)
class ObjectiveOutput:
    """What `Objective.loss` returns for one micro-batch.

    Args:
        loss: 0-d, this micro-batch's share of the optimizer step's loss: the shares add up, they are not averaged.
        metrics: `{name: 0-d detached tensor}`, means over this micro-batch's tokens.
        tokens: 0-d float32, the masked-in tokens: the weight of `metrics` when averaging over micro-batches.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    tokens: Tensor


class Objective:
    """A policy-gradient objective from plain values.

    Args:
        advantage: name and settings of `advantage.py`, e.g. `{name: group_norm, eps: 1.0e-4, ddof: 1}`.
        ratio: `token`, `sequence` or `sequence_token`.
        clip: e.g. `{name: ppo, low: 0.2, high: 0.28, dual: null}`.
        aggregation: e.g. `token_mean`.
        kl: `{estimator: k3, place: loss, weight: 0.04}`; weight 0 or null: no KL term and no reference.
        entropy_coef: weight of the entropy bonus, -coef * mean_t H over the step's tokens; 0 is off.
        correction: name and settings of `correction.py`, for an engine whose log-probs differ from the trainer's, e.g.
            `{name: truncate, level: token, high: 2.0}`; null is off, and no YAML has it: type
            `'+algorithm.correction={name: truncate, level: token, high: 2.0}'`.

    Example::

        objective = Objective(
            advantage={"name": "group_norm", "eps": 1e-4, "ddof": 1},
            ratio="token",
            clip={"name": "ppo", "low": 0.2, "high": 0.2, "dual": None},
            aggregation="seq_mean_token_mean",
            kl={"estimator": "k3", "place": "loss", "weight": 0.04},
        )
        lit-reason-train algorithm=grpo algorithm.clip.high=0.28 algorithm.aggregation=token_mean
    """

    def __init__(
        self,
        advantage: str | Mapping[str, Any],
        ratio: str | Mapping[str, Any],
        clip: str | Mapping[str, Any],
        aggregation: str | Mapping[str, Any],
        kl: Mapping[str, Any] | None = None,
        entropy_coef: float = 0.0,
        correction: Mapping[str, Any] | None = None,
    ) -> None:
        check_value("entropy_coef", entropy_coef, float)
        self._advantage = resolve("advantage", advantage, ADVANTAGES)
        self._ratio = resolve("ratio", ratio, RATIOS)
        self._clip = resolve("clip", clip, CLIPS)
        self._aggregation = resolve("aggregation", aggregation, AGGREGATIONS)
        self._kl = resolve_kl(kl)
        self._correction = None if correction is None else resolve("correction", correction, CORRECTIONS)
        self.entropy_coef = float(entropy_coef)
        self.advantage_name = advantage if isinstance(advantage, str) else str(advantage["name"])
        self.clip_name = clip if isinstance(clip, str) else str(clip["name"])
        self._advantage_settings = {} if isinstance(advantage, str) else dict(advantage)
        # A range error of a surrogate should not wait for the first rollout.
        self._clip(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
        if self._kl.place == "token_reward" and not _takes(self._advantage, "penalty_BT"):
            takers = [name for name, f in ADVANTAGES.items() if _takes(f, "penalty_BT")]
            raise ConfigError(
                f"kl.place: got 'token_reward' with advantage {self.advantage_name!r}, which has one number per "
                f"sequence; valid with it: {', '.join(takers)}. Type algorithm.kl.place=reward"
            )
        self._probe_advantage()
        if self._correction is not None:
            self._correction(torch.zeros(1, 1), torch.ones(1, 1))

    def _probe_advantage(self) -> None:
        """What a choice refuses, it refuses before the first rollout."""
        one_BT = torch.ones(1, 1, dtype=torch.float64)
        per_token = {"old_logprobs_BT": -one_BT} if _takes(self._advantage, "old_logprobs_BT") else {}
        if self.needs_ref and self._kl.place == "token_reward":
            per_token["penalty_BT"] = one_BT
        first_B, valid_B = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
        self._advantage(one_BT, one_BT[0], first_B, valid_B, one_BT, **per_token)

    @property
    def needs_ref(self) -> bool:
        """Whether the reference's log-probs must be computed."""
        return self._kl.weight != 0

    @property
    def needs_old(self) -> bool:
        """Whether `advantages` must be given the sampling policy's log-probs, even with one update per round."""
        return self._kl_in_reward or _takes(self._advantage, "old_logprobs_BT")

    @property
    def _kl_in_reward(self) -> bool:
        return self.needs_ref and self._kl.place != "loss"

    @property
    def needs_entropy(self) -> bool:
        """Whether `loss` must be given `entropy_BT` with its gradient."""
        return self.entropy_coef != 0

    @property
    def has_ratio(self) -> bool:
        """Whether samples of an older policy are weighted as such; without, a round allows one update."""
        return self.clip_name != "reinforce"

    @property
    def min_group_size(self) -> int:
        """Completions per prompt below which every advantage would be 0."""
        return min_group_size(self.advantage_name, self._advantage_settings)

    def advantages(
        self,
        rewards_BR: Tensor,
        weights_R: Tensor,
        group_B: Tensor,
        mask_BT: Tensor,
        valid_B: Tensor | None = None,
        old_logprobs_BT: Tensor | None = None,
        ref_logprobs_BT: Tensor | None = None,
    ) -> Tensor:
        """The advantage of every token, in `mask_BT`'s dtype, also where masked.

        Args:
            rewards_BR: one column per reward, unweighted.
            weights_R: weights of the columns. GDPO weights the normalised advantages, all others the rewards.
            group_B: int64, which prompt a row belongs to; rows need not be sorted.
            mask_BT: 1 where a completion token counts.
            valid_B: bool; rows whose reward failed are False: they are left out of every statistic and get 0.
            old_logprobs_BT, ref_logprobs_BT: needed for a KL in the reward, and the first by `clip_cov`. With `place:
                reward` the KL enters as one more column, -k1 summed over the sequence, with the KL's weight (with
                `gdpo` normalised like the others); with `token_reward` each token has its own.

        Give it all rows of an optimizer step, or of the round: batch statistics are over the rows that are given.
        """
        valid_B = torch.ones_like(group_B, dtype=torch.bool) if valid_B is None else valid_B.bool()
        _check_finite(rewards_BR, valid_B)
        # float64: the statistics are over few numbers, and rounding of equal sums must not look like a signal.
        rewards_BR = rewards_BR.double().masked_fill(~valid_B[:, None], 0)
        weights_R = weights_R.double()
        per_token = ()
        if _takes(self._advantage, "old_logprobs_BT"):
            per_token = (_given(old_logprobs_BT, "old").double().masked_fill(mask_BT <= 0, 0),)
        if self._kl_in_reward:
            kl_BT = self._sampled_kl(old_logprobs_BT, ref_logprobs_BT, mask_BT)
            if self._kl.place == "token_reward":
                per_token = (-self._kl.weight * kl_BT,)
            else:
                rewards_BR = torch.cat([rewards_BR, -kl_BT.sum(dim=1, keepdim=True)], dim=1)
                weights_R = torch.cat([weights_R, weights_R.new_tensor([self._kl.weight])])
        advantages = self._advantage(rewards_BR, weights_R, group_B, valid_B, mask_BT, *per_token).to(mask_BT.dtype)
        return advantages if advantages.dim() == 2 else advantages[:, None].repeat(1, mask_BT.shape[1])

    def loss(self, new_logprobs_BT: Tensor, batch: PolicyBatch, entropy_BT: Tensor | None = None) -> ObjectiveOutput:
        """This micro-batch's exact share of the optimizer step's loss.

        Args:
            new_logprobs_BT: the policy's log-probs of `batch.target_ids_BT`, with gradient; anything where masked.
            batch: `old_logprobs_BT` None means old = new.detach(): the ratio is exactly 1.
            entropy_BT: the policy's entropy at each position over the *whole vocabulary*; -log p of the sampled token
                has the right value and zero expected gradient.
        """
        on_BT = batch.mask_BT > 0
        new_BT = new_logprobs_BT.masked_fill(~on_BT, 0)
        old_BT = new_BT.detach() if batch.old_logprobs_BT is None else batch.old_logprobs_BT.masked_fill(~on_BT, 0)
        ref_BT = None if batch.ref_logprobs_BT is None else batch.ref_logprobs_BT.masked_fill(~on_BT, 0)

        ratio_BT = self._ratio(new_BT, old_BT, batch.mask_BT)
        surrogate = self._clip(ratio_BT, batch.advantages_BT.masked_fill(~on_BT, 0), new_BT, batch.mask_BT)
        loss_BT, metrics = surrogate.loss_BT, ratio_metrics(ratio_BT, surrogate, on_BT)
        if self._correction is not None:
            log_rho_BT = log_ratio(old_BT, batch.rollout_logprobs_BT, batch.mask_BT)
            correction = self._correction(log_rho_BT, batch.mask_BT)
            loss_BT = loss_BT * correction.weights_BT
            metrics |= correction_metrics(correction, on_BT)
        if self.needs_ref and self._kl.place == "loss":
            loss_BT = loss_BT + self._kl.weight * self._kl.estimator(new_BT, _given(ref_BT, "reference"), ratio_BT)
        loss = (self._aggregation(batch) * loss_BT).sum()
        if self.needs_entropy:
            entropy = _given(entropy_BT, "entropy").masked_fill(~on_BT, 0).sum() / batch.tokens_total.clamp(min=1)
            loss = loss - self.entropy_coef * entropy

        metrics |= mismatch_metrics(old_BT, batch.rollout_logprobs_BT, on_BT)
        if ref_BT is not None:
            metrics |= kl_metrics(new_BT, ref_BT, on_BT)
        if entropy_BT is not None:
            metrics["entropy"] = masked_mean(entropy_BT, on_BT)
        return ObjectiveOutput(loss, metrics, on_BT.sum().float())

    def _sampled_kl(self, old_BT: Tensor | None, ref_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
        """KL of each token at the *sampling* policy: a reward is a constant of the update."""
        off_BT = mask_BT <= 0
        old_BT = _given(old_BT, "old").double().masked_fill(off_BT, 0)
        ref_BT = _given(ref_BT, "reference").double().masked_fill(off_BT, 0)
        return self._kl.estimator(old_BT, ref_BT, torch.ones_like(old_BT)).detach()


def check_group_size(objective: Objective, group_size: int, key: str = "group_size") -> None:
    """Refuse a group that the objective cannot learn from: alone in its group, a completion has advantage 0.

    Args:
        key: what the user types to set it, for the message.

    Raises:
        ConfigError: fewer completions per prompt than the advantage compares.
    """
    if group_size < objective.min_group_size:
        raise ConfigError(
            f"{key}: got {group_size}; valid: {objective.min_group_size} or more, because advantage "
            f"{objective.advantage_name!r} compares the completions of one prompt with each other (alone, every "
            f"advantage is 0 and nothing is learnt). Type {key}=8"
        )


_MISSING = {
    "reference": "the KL term needs the reference's log-probs: set batch.ref_logprobs_BT, or algorithm.kl.weight=0",
    "old": "a KL in the reward, or advantage clip_cov, needs the sampling policy's log-probs: pass old_logprobs_BT, or "
    "type algorithm.kl.place=loss, or another algorithm.advantage",
    "entropy": "an entropy bonus needs the policy's entropy: pass entropy_BT, or type algorithm.entropy_coef=0",
}


def _takes(advantage: Callable[..., Tensor], parameter: str) -> bool:
    return parameter in inspect.signature(advantage).parameters


def _given(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise ConfigError(f"got no {what} values; {_MISSING[what]}")
    return tensor


def _check_finite(rewards_BR: Tensor, valid_B: Tensor) -> None:
    wrong_BR = ~rewards_BR.isfinite() & valid_B[:, None]
    if wrong_BR.any():
        row, column = (int(i) for i in wrong_BR.nonzero()[0])
        raise NonFiniteError(
            f"reward column {column} is {float(rewards_BR[row, column])} in row {row}; valid: a finite number, or "
            "valid_B False for a row whose verifier failed"
        )
