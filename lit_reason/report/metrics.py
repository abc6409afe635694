"""The names that a training run logs: what each means, what is healthy, what to do otherwise.

One table for people and for code: the README prints `markdown_table()`, the HTML report marks values that leave
`low..high`. Names are final; a user's dashboards rely on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_reason.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Metric:
    """One logged quantity.

    Args:
        name: as logged; `<name>` and `<role>` stand for a reward and a parameter role.
        meaning: one line, with units.
        healthy: in words.
        action: what to do when it is not.
        low, high: the bounds beyond which a report marks the value; None for "no bound".
    """

    name: str
    meaning: str
    healthy: str
    action: str
    low: float | None = None
    high: float | None = None

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile("[^/]+".join(re.escape(part) for part in re.split(r"<\w+>", self.name)))


METRICS: tuple[Metric, ...] = (
    Metric(
        "reward/<name>/mean",
        "mean of one reward over the step's completions",
        "rises, or stays where it is full",
        "flat at 0: prime longer or take easier prompts; one rises while another falls: change the weights",
    ),
    Metric(
        "reward/<name>/std",
        "its standard deviation over the step's completions",
        "above 0 until the reward is full",
        "0 from the start: the reward never varies and teaches nothing",
    ),
    Metric(
        "reward/zero_std_fraction",
        "share of groups that teach nothing: every completion has advantage 0",
        "0.1 to 0.7",
        "near 1: larger groups, higher temperature, or prompts of medium difficulty",
        high=0.9,
    ),
    Metric(
        "reward/faults",
        "verifier errors and time-outs of the step (count)",
        "0",
        "read the first message in the completions table; above 1% the run stops",
        high=0,
    ),
    Metric(
        "advantage/std",
        "standard deviation of the advantages over sequences",
        "about 1 with normalisation, above 0 without",
        "0: no group varies (see reward/zero_std_fraction)",
        low=1e-6,
    ),
    Metric(
        "kl/k1",
        "mean log(policy / reference) per sampled token (nats): unbiased, may be negative",
        "slowly rising, below 0.2",
        "jumps: lower the learning rate or raise the KL weight",
        low=-0.5,
        high=0.5,
    ),
    Metric(
        "kl/k3",
        "the same by an estimator that is never negative (nats)",
        "close to kl/k1",
        "far above kl/k1: a few tokens moved very far; lower the learning rate",
        high=0.5,
    ),
    Metric(
        "entropy",
        "mean entropy of the next-token distribution (nats)",
        "falls slowly, stays above 0.02",
        "collapses to 0: raise clip high, the temperature or the entropy bonus",
        low=0.02,
    ),
    Metric(
        "ratio/clip_low",
        "share of tokens whose ratio was clipped from below",
        "below 0.1; exactly 0 with one update per round",
        "higher: lower the learning rate, fewer updates per round",
        high=0.2,
    ),
    Metric(
        "ratio/clip_high",
        "share of tokens whose ratio was clipped from above",
        "below 0.1; exactly 0 with one update per round",
        "higher: lower the learning rate, fewer updates per round",
        high=0.2,
    ),
    Metric("ratio/q01", "1% quantile of the ratio new/old", "0.7 to 1", "lower: the updates are too large", low=0.5),
    Metric("ratio/q99", "99% quantile of the ratio new/old", "1 to 1.4", "higher: the updates are too large", high=2),
    Metric(
        "mismatch/kl",
        "KL between the engine's and the trainer's log-probs of the same tokens (nats)",
        "below 0.01 in bf16, about 0 in fp32",
        "rises: weights not pushed, or engine and trainer compute differently",
        low=-0.02,
        high=0.02,
    ),
    Metric(
        "completion/length",
        "mean length of a completion (tokens)",
        "steady",
        "runs to the limit: add a length reward or raise rollout.sampling.max_tokens",
    ),
    Metric(
        "completion/truncated",
        "share of completions cut off at the limit",
        "below 0.1",
        "higher: raise rollout.sampling.max_tokens or add a length reward",
        high=0.3,
    ),
    Metric(
        "expert/max_violation",
        "largest load / mean load - 1 of any expert, worst layer",
        "below 1",
        "rises: raise the router bias rate, or freeze the router in RL",
        high=2,
    ),
    Metric("expert/dead", "experts of any layer that got no token in the step", "0", "raise the bias rate", high=0),
    Metric("speed/generate_tokens_per_s", "sampled tokens per second", "constant", "falls: completions grow"),
    Metric("speed/score_per_s", "completions scored per second", "far above generation", "falls: a verifier hangs"),
    Metric("speed/train_tokens_per_s", "tokens trained per second", "constant", "falls: a busy machine"),
    Metric("speed/sync_s", "seconds to push the weights to the engine", "well below a step", "use a nearer engine"),
    Metric("lr/<role>", "learning rate of one parameter role", "as scheduled", "0 too early: check max_steps"),
    Metric(
        "loss",
        "the optimizer step's loss; about 0 by construction in policy gradients",
        "finite, no trend needed",
        "judge by the rewards, not by the loss",
    ),
    Metric(
        "grad_norm",
        "norm of the gradient before clipping",
        "steady, above 0",
        "0: nothing to learn from (see advantage/std); spikes: lower the learning rate or clip",
        low=1e-12,
    ),
)

# Logged beside these, or with what they belong to.
MORE_METRICS: tuple[Metric, ...] = (
    Metric(
        "sync/gap",
        "mean difference of the engine's and the trainer's log-probs of the median canary after a push (nats)",
        "below 0.05 in bf16, 0.0001 in fp32",
        "rises: engine and trainer compute differently; above rollout.proof.limit the run stops",
    ),
    Metric("sync/tensors", "tensors whose checksum in the engine was compared after a push", "constant", "0: no proof"),
    Metric("speed/proof_s", "seconds that the proof of a push took", "well below a step", "rollout.proof.count=2"),
    Metric(
        "mismatch/max",
        "largest difference of the engine's and the trainer's log-prob of one token (nats)",
        "below 0.5 in bf16",
        "see mismatch/kl",
    ),
    Metric(
        "mismatch/ess",
        "effective sample size of the ratios trainer / engine, as a share of the tokens",
        "above 0.95",
        "falls: few tokens carry the step; correct for it (algorithm.correction) or mend the engine",
        low=0.5,
    ),
    Metric(
        "correction/cut",
        "share of tokens whose engine correction was truncated or masked",
        "below 0.05",
        "higher: engine and trainer disagree; see mismatch/kl before you widen the bounds",
        high=0.2,
    ),
    Metric(
        "correction/ess",
        "effective sample size of the correction's weights, as a share of the tokens",
        "above 0.9",
        "falls: heavy rejection is a smaller step; see mismatch/kl",
        low=0.5,
    ),
    Metric(
        "router/replayed",
        "share of (token, MoE layer) that took the engine's experts where the trainer would have chosen others",
        "below 0.1 in bf16, 0 in fp32",
        "rises: engine and trainer see other weights or states; see mismatch/kl",
        high=0.3,
    ),
    Metric("critic/loss", "value loss per token", "falls, then steady", "rises: lower algorithm.critic.lr_factor"),
    Metric(
        "critic/explained_variance",
        "1 - variance of (return - value) / variance of the return: 1 is a perfect critic",
        "above 0.2 after some rounds",
        "below 0: worse than a constant; raise algorithm.critic.lr_factor, or more updates per round",
        low=-0.5,
    ),
    Metric(
        "distillation/divergence",
        "generalised JSD to the teacher per token (nats)",
        "falls",
        "flat: raise the learning rate; a teacher of another style needs priming first",
    ),
    Metric(
        "rollout/refilled",
        "groups that were generated to replace groups without a signal",
        "below prompts_per_round",
        "above: the prompts are too easy or too hard",
    ),
    Metric(
        "rollout/age/mean",
        "rounds between the weights that wrote a token and those that train on it, over the round's tokens",
        "0; up to rollout.shape.staleness",
        "with staleness it costs accuracy where mismatch/kl rises: correct for it (algorithm.correction)",
    ),
    Metric("rollout/age/max", "that of the oldest token", "at most rollout.shape.staleness", "see rollout/age/mean"),
    Metric(
        "speed/wait_s",
        "seconds that training waited for completions and their scores",
        "near 0 with staleness; generation's time without",
        "with staleness: generation takes longer than training, so give it more of the machine",
    ),
    Metric("coefficient/kl", "the adaptive KL weight", "steady", "runs away: another algorithm.kl.target"),
    Metric("coefficient/entropy", "the adaptive entropy weight", "steady", "runs away: a lower entropy_target"),
)
ALL_METRICS = METRICS + MORE_METRICS


def find_metric(name: str) -> Metric:
    """The table's entry of a logged name: `find_metric("reward/answer/mean").name == "reward/<name>/mean"`."""
    for metric in ALL_METRICS:
        if metric.pattern.fullmatch(name):
            return metric
    raise ConfigError(f"no metric is called {name!r}; {nearest(name, [m.name for m in ALL_METRICS])}")


def out_of_range(record: Mapping[str, Any]) -> dict[str, Metric]:
    """`{logged name: entry}` of the values that are not finite or leave the healthy bounds."""
    found = {}
    for name, value in record.items():
        metric = next((m for m in ALL_METRICS if m.pattern.fullmatch(name)), None)
        if metric is None or not isinstance(value, int | float):
            continue
        low = -float("inf") if metric.low is None else metric.low
        high = float("inf") if metric.high is None else metric.high
        if value != value or abs(value) == float("inf") or not low <= value <= high:
            found[name] = metric
    return found


def markdown_table() -> str:
    """The table of the README."""
    lines = ["| name | meaning | healthy | if not |", "|---|---|---|---|"]
    lines += [f"| `{m.name}` | {m.meaning} | {m.healthy} | {m.action} |" for m in ALL_METRICS]
    return "\n".join(lines)
