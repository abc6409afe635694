"""One policy-gradient objective: a choice on each of five axes.

    B sequences   T tokens   R rewards

    rewards_BR (values_BT) --advantage--> advantages_BT --.
    new, old log-probs -------ratio-----> ratio_BT -------+--clip--> loss_BT --(+ weight * KL_BT)--aggregation--> loss
    (old, engine's log-probs -correction-> weights_BT, times what the clip returns)
    (+ entropy bonus, value loss, divergence to a teacher: each a term of its own)

GRPO, DAPO, GDPO and their like are `conf/algorithm/*.yaml`, nothing else: any mixture of the axes is as good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.objectives.advantage import ADVANTAGES, BINARY, COMPARING, min_group_size
from lit_reason.objectives.aggregation import AGGREGATIONS, token_mean
from lit_reason.objectives.checks import check_rewards, given, takes
from lit_reason.objectives.choices import resolve
from lit_reason.objectives.clip import CLIPS, TOKEN_RATIO
from lit_reason.objectives.coefficients import Coefficients, EntropyRule
from lit_reason.objectives.correction import Correction, correction_metrics, log_ratio, resolve_correction
from lit_reason.objectives.critic import resolve_critic, value_loss
from lit_reason.objectives.distillation import resolve_distillation
from lit_reason.objectives.kl import resolve_kl
from lit_reason.objectives.metrics import critic_metrics, kl_metrics, masked_mean, mismatch_metrics, ratio_metrics
from lit_reason.objectives.ratio import RATIOS
from lit_reason.types import Assessed, PolicyBatch


@dataclass(slots=True)
class ObjectiveOutput:
    """What `Objective.loss` returns for one micro-batch.

    Args:
        loss: 0-d, this micro-batch's share of the optimizer step's loss: the shares add up, they are not averaged.
        metrics: `{name: 0-d detached tensor}`, means over this micro-batch's tokens; `.../max` is the largest,
            `.../ess` and `.../explained_variance` are moments, see `metrics.py`.
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
        kl: `{name: k3_loss, weight: 0.04}`, see `kl.py`; weight 0 or null: no KL term and no reference. With
            `target: 0.05` (nats per token) the weight steers to it.
        entropy_coef: weight of the entropy bonus, -coef * mean_t H over the step's tokens; 0 is off.
        entropy_target, entropy_step: a bonus that acts below this entropy (nats) and grows by so much per step there.
        correction: name and settings of `correction.py`, for an engine whose log-probs differ from the trainer's, e.g.
            `{name: truncate, level: token, high: 2.0}`; null is off. With `above: 0.01` it acts in rounds whose
            `mismatch/kl` is larger. No YAML has it: type
            `'+algorithm.correction={name: truncate, level: token, high: 2.0}'`.
        critic: how values are learnt, for advantage `gae`: `{trunk, lr_factor, loss_coef, clip}`.
        distillation: `{beta: 0.5, weight: 1.0}`: the generalised JSD to a teacher over the whole vocabulary.

    Example::

        objective = Objective(
            advantage={"name": "group_norm", "eps": 1e-4, "ddof": 1},
            ratio="token",
            clip={"name": "ppo", "low": 0.2, "high": 0.2, "dual": None},
            aggregation="seq_mean_token_mean",
            kl={"name": "k3_loss", "weight": 0.04},
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
        critic: Mapping[str, Any] | None = None,
        distillation: Mapping[str, Any] | None = None,
        entropy_target: float | None = None,
        entropy_step: float = 0.005,
    ) -> None:
        entropy = EntropyRule(entropy_coef, entropy_target, entropy_step)
        self._advantage = resolve("advantage", advantage, ADVANTAGES)
        self._ratio = resolve("ratio", ratio, RATIOS)
        self._clip = resolve("clip", clip, CLIPS)
        self._aggregation = resolve("aggregation", aggregation, AGGREGATIONS)
        kl_rule = resolve_kl(kl)
        self._kl = kl_rule.term
        self._correction, self._correction_above = resolve_correction(correction)
        self.critic = None if critic is None else resolve_critic(critic)
        self._distillation = None if distillation is None else resolve_distillation(distillation)
        self.coefficients = Coefficients(kl_rule, entropy)
        self.needs_entropy = bool(entropy_coef) or entropy_target is not None
        self.needs_ref = kl_rule.weight != 0
        self.advantage_name = advantage if isinstance(advantage, str) else str(advantage["name"])
        self._ratio_name = ratio if isinstance(ratio, str) else str(ratio["name"])
        self.clip_name = clip if isinstance(clip, str) else str(clip["name"])
        self._advantage_settings = {} if isinstance(advantage, str) else dict(advantage)
        self._check_choices()

    def _check_choices(self) -> None:
        """What a choice, or a pair of them, refuses, it refuses before the first rollout."""
        if self._kl.place == "token_reward" and not takes(self._advantage, "penalty_BT"):
            takers = [name for name, f in ADVANTAGES.items() if takes(f, "penalty_BT")]
            raise ConfigError(
                f"kl.name: got 'k1_token_reward' with advantage {self.advantage_name!r}, which has one number per "
                f"sequence; valid with it: {', '.join(takers)}. Type algorithm.kl.name=k1_reward"
            )
        if self.needs_values != (self.critic is not None):
            raise ConfigError(
                f"critic: got {'one' if self.critic else 'none'} with advantage {self.advantage_name!r}; valid: a "
                "critic with advantage 'gae', and with no other. Type algorithm=ppo"
            )
        if takes(self._clip, "marked_BT") and self.advantage_name != "kl_cov":
            raise ConfigError(
                f"clip: got 'kl_cov' with advantage {self.advantage_name!r}; valid: advantage kl_cov, which marks the "
                "tokens that it treats apart. Type algorithm=kl_cov"
            )
        if self.clip_name in TOKEN_RATIO and self._ratio_name != "token":
            raise ConfigError(
                f"ratio: got {self._ratio_name!r} with clip {self.clip_name!r}, which looks at each token's own ratio; "
                "valid with it: token. Type algorithm.ratio=token"
            )
        if self._kl_in_reward and self.advantage_name in (*BINARY, "none"):
            raise ConfigError(
                f"kl: a KL in the reward with advantage {self.advantage_name!r}, which takes rewards of 0 and 1, or "
                "none at all; valid: a KL in the loss. Type algorithm.kl.name=k2_loss"
            )
        one_BT, first_B = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        known = {"old_logprobs_BT": -one_BT, "values_BT": one_BT, "greedy_BR": one_BT}
        known |= {"penalty_BT": one_BT} if self.needs_ref and self._kl.place == "token_reward" else {}
        self._advantage(one_BT, one_BT[0], first_B, one_BT[0].bool(), one_BT, **self._wanted(known))
        marked = {"marked_BT": one_BT.bool()} if takes(self._clip, "marked_BT") else {}
        self._clip(one_BT, one_BT, -one_BT, one_BT, **marked)
        if self._correction is not None:
            self._correction(one_BT, one_BT)

    def _wanted(self, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of what is known beside the rewards, what this advantage asks for."""
        return {name: value for name, value in known.items() if takes(self._advantage, name)}

    @property
    def needs_old(self) -> bool:
        """Whether the sampling policy's log-probs must be computed even with one update per round."""
        return self._kl_in_reward or takes(self._advantage, "old_logprobs_BT") or self._correction_above is not None

    @property
    def needs_values(self) -> bool:
        """Whether a critic must say the values of the sampled tokens."""
        return takes(self._advantage, "values_BT")

    @property
    def needs_greedy(self) -> bool:
        """Whether a greedy completion of each prompt must be scored."""
        return takes(self._advantage, "greedy_BR")

    @property
    def needs_teacher(self) -> bool:
        """Whether the reference must be a teacher: the policy's own start has nothing to teach."""
        return self.advantage_name == "distill" or self._distillation is not None

    @property
    def divergence_beta(self) -> float | None:
        """Of the generalised JSD to the teacher that `loss` must be given at each token; None without one."""
        return None if self._distillation is None else self._distillation.beta

    @property
    def compares(self) -> bool:
        """Whether a group whose rewards are all equal teaches nothing."""
        return self.advantage_name in (*COMPARING, *BINARY)

    @property
    def per_reward(self) -> bool:
        """Whether a group teaches something as soon as any one reward varies in it, even if their sum does not."""
        return self.advantage_name == "gdpo"

    @property
    def _kl_in_reward(self) -> bool:
        return self.needs_ref and self._kl.place != "loss"

    @property
    def has_ratio(self) -> bool:
        """Whether samples of an older policy are weighted as such; without, a round allows one update."""
        return self.clip_name != "reinforce"

    @property
    def min_group_size(self) -> int:
        """Completions per prompt below which every advantage would be 0."""
        return min_group_size(self.advantage_name, self._advantage_settings)

    def advantages(
        self, rewards_BR: Tensor, weights_R: Tensor, group_B: Tensor, mask_BT: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The advantage of every token alone; see `assess`."""
        return self.assess(rewards_BR, weights_R, group_B, mask_BT, *args, **kwargs).advantages

    def assess(
        self,
        rewards_BR: Tensor,
        weights_R: Tensor,
        group_B: Tensor,
        mask_BT: Tensor,
        valid_B: Tensor | None = None,
        old_logprobs_BT: Tensor | None = None,
        ref_logprobs_BT: Tensor | None = None,
        values_BT: Tensor | None = None,
        greedy_BR: Tensor | None = None,
    ) -> Assessed:
        """What the rewards say of every token, in `mask_BT`'s dtype, also where masked.

        Args:
            rewards_BR: one column per reward, unweighted.
            weights_R: weights of the columns. GDPO weights the normalised advantages, all others the rewards.
            group_B: int64, which prompt a row belongs to; rows need not be sorted.
            mask_BT: 1 where a completion token counts.
            valid_B: bool; rows whose reward failed are False: they are left out of every statistic and get 0.
            old_logprobs_BT, ref_logprobs_BT: needed for a KL in the reward, and the first by `clip_cov` and `kl_cov`.
                `k1_reward` enters as one more column, -k1 summed over the sequence, with the KL's weight (with `gdpo`
                normalised like the others); with `k1_token_reward` each token has its own.
            values_BT: the critic's, for `gae`.
            greedy_BR: the rewards of the greedy completion of each row's prompt, for `remax`.

        Give it all rows of an optimizer step, or of the round: batch statistics are over the rows that are given.
        """
        valid_B = torch.ones_like(group_B, dtype=torch.bool) if valid_B is None else valid_B.bool()
        check_rewards(rewards_BR, valid_B)
        # float64: the statistics are over few numbers, and rounding of equal sums must not look like a signal.
        rewards_BR = rewards_BR.double().masked_fill(~valid_B[:, None], 0)
        weights_R, off_BT = weights_R.double(), mask_BT <= 0
        known: dict[str, Tensor] = {}
        if takes(self._advantage, "old_logprobs_BT"):
            known["old_logprobs_BT"] = given(old_logprobs_BT, "old").double().masked_fill(off_BT, 0)
        if self.needs_values:
            known["values_BT"] = given(values_BT, "critic").double().masked_fill(off_BT, 0)
        if self.needs_greedy:
            greedy_BR = given(greedy_BR, "greedy reward")
            check_rewards(greedy_BR, valid_B)
            known["greedy_BR"] = greedy_BR.double().masked_fill(~valid_B[:, None], 0)
        if self._kl_in_reward:
            kl_BT = self._sampled_kl(old_logprobs_BT, ref_logprobs_BT, mask_BT)
            if self._kl.place == "token_reward":
                known["penalty_BT"] = -self.coefficients.kl * kl_BT
            else:
                rewards_BR = torch.cat([rewards_BR, -kl_BT.sum(dim=1, keepdim=True)], dim=1)
                weights_R = torch.cat([weights_R, weights_R.new_tensor([self.coefficients.kl])])
                if self.needs_greedy:  # the baseline has no such column: it is not trained on
                    known["greedy_BR"] = torch.nn.functional.pad(known["greedy_BR"], (0, 1))
        assessed = self._advantage(rewards_BR, weights_R, group_B, valid_B, mask_BT, **known)
        assessed = assessed if isinstance(assessed, Assessed) else Assessed(assessed)
        advantages, returns_BT = assessed.advantages.to(mask_BT.dtype), assessed.returns_BT
        return Assessed(
            advantages if advantages.dim() == 2 else advantages[:, None].repeat(1, mask_BT.shape[1]),
            None if returns_BT is None else returns_BT.to(mask_BT.dtype),
            assessed.marked_BT,
        )

    def loss(
        self,
        new_logprobs_BT: Tensor,
        batch: PolicyBatch,
        entropy_BT: Tensor | None = None,
        values_BT: Tensor | None = None,
        divergence_BT: Tensor | None = None,
    ) -> ObjectiveOutput:
        """This micro-batch's exact share of the optimizer step's loss.

        Args:
            new_logprobs_BT: the policy's log-probs of `batch.target_ids_BT`, with gradient; anything where masked.
            batch: `old_logprobs_BT` None means old = new.detach(): the ratio is exactly 1.
            entropy_BT: the policy's entropy at each position over the *whole vocabulary*; -log p of the sampled token
                has the right value and zero expected gradient.
            values_BT: the critic's values now, with gradient, for a critic.
            divergence_BT: the generalised JSD to the teacher at each position, with gradient, for `distillation`.
        """
        on_BT = batch.mask_BT > 0
        new_BT = new_logprobs_BT.masked_fill(~on_BT, 0)
        old_BT = new_BT.detach() if batch.old_logprobs_BT is None else batch.old_logprobs_BT.masked_fill(~on_BT, 0)
        ref_BT = None if batch.ref_logprobs_BT is None else batch.ref_logprobs_BT.masked_fill(~on_BT, 0)

        ratio_BT = self._ratio(new_BT, old_BT, batch.mask_BT)
        marked = {"marked_BT": given(batch.marked_BT, "mark")} if takes(self._clip, "marked_BT") else {}
        surrogate = self._clip(ratio_BT, batch.advantages_BT.masked_fill(~on_BT, 0), new_BT, batch.mask_BT, **marked)
        loss_BT, metrics = surrogate.loss_BT, ratio_metrics(ratio_BT, surrogate, on_BT)
        if self._correction is not None:
            weights_BT, cut_BT = self._correction(
                log_ratio(old_BT, batch.rollout_logprobs_BT, batch.mask_BT), batch.mask_BT
            )
            acts = self._corrects(batch)
            correction = Correction(torch.where(acts, weights_BT, 1.0), cut_BT & acts)
            loss_BT = loss_BT * correction.weights_BT
            metrics |= correction_metrics(correction, on_BT)
        if self.needs_ref and self._kl.place == "loss":
            # Of tokens, whatever the surrogate's: another's gradient would be of neither KL.
            token_ratio_BT = RATIOS["token"](new_BT, old_BT, batch.mask_BT)
            kl_BT = self._kl.estimator(new_BT, given(ref_BT, "reference"), token_ratio_BT)
            loss_BT = loss_BT + self.coefficients.kl * kl_BT
        if self._distillation is not None:
            divergence_BT = given(divergence_BT, "divergence").masked_fill(~on_BT, 0)
            loss_BT = loss_BT + self._distillation.weight * divergence_BT
            metrics["distillation/divergence"] = masked_mean(divergence_BT, on_BT)
        loss = (self._aggregation(batch) * loss_BT).sum()
        if self.needs_entropy:
            entropy = (token_mean(batch) * given(entropy_BT, "entropy").masked_fill(~on_BT, 0)).sum()
            loss = loss - self.coefficients.entropy * entropy
        if self.critic is not None:
            values_BT, old_values_BT, returns_BT = (
                given(tensor, what).masked_fill(~on_BT, 0)
                for tensor, what in ((values_BT, "critic"), (batch.values_BT, "critic"), (batch.returns_BT, "return"))
            )
            wrong_BT = value_loss(values_BT, old_values_BT, returns_BT, clip=self.critic.clip)
            loss = loss + self.critic.loss_coef * (token_mean(batch) * wrong_BT).sum()
            metrics |= critic_metrics(values_BT, returns_BT, wrong_BT, on_BT)

        metrics |= mismatch_metrics(old_BT, batch.rollout_logprobs_BT, on_BT)
        if ref_BT is not None:
            metrics |= kl_metrics(new_BT, ref_BT, on_BT)
        if entropy_BT is not None:
            metrics["entropy"] = masked_mean(entropy_BT, on_BT)
        return ObjectiveOutput(loss, metrics, on_BT.sum().float())

    def _corrects(self, batch: PolicyBatch) -> Tensor:
        """bool, 0-d: whether the correction acts on this round."""
        if self._correction_above is None:
            return torch.ones((), dtype=torch.bool, device=batch.mask_BT.device)
        return given(batch.mismatch_kl, "mismatch") > self._correction_above

    def _sampled_kl(self, old_BT: Tensor | None, ref_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
        """KL of each token at the *sampling* policy: a reward is a constant of the update."""
        off_BT = mask_BT <= 0
        old_BT = given(old_BT, "old").double().masked_fill(off_BT, 0)
        ref_BT = given(ref_BT, "reference").double().masked_fill(off_BT, 0)
        return self._kl.estimator(old_BT, ref_BT, torch.ones_like(old_BT)).detach()
