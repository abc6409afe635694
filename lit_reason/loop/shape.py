"""How a round is made and cut, what it calls, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lit_reason.errors import ConfigError
from lit_reason.types import Assessed, Completion, PolicyBatch, Prompt, RolloutGroup, Scores


@dataclass(frozen=True)
class RoundShape:
    """How a round is made and cut.

    Args:
        rounds: how many rounds the run has.
        prompts_per_round, group_size: P and G; a round has B = P * G completions.
        epochs: passes over a round's completions.
        minibatches: optimizer steps per pass.
        micro_batches: backward passes per optimizer step; must equal the Trainer's `accumulate_grad_batches`.
        refills: dynamic sampling (DAPO, arXiv 2503.14476): groups without a signal are replaced by new prompts' groups,
            in at most so many further generations; what is then still without a signal is masked. 0 keeps all groups.
        mask_truncated: completions that were cut off at the limit are not learnt from (DAPO's overlong filtering).
            They still count in their group's statistics.
    """

    rounds: int = 100
    prompts_per_round: int = 32
    group_size: int = 8
    epochs: int = 1
    minibatches: int = 1
    micro_batches: int = 1
    refills: int = 0
    mask_truncated: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "mask_truncated" and value < (0 if name == "refills" else 1):
                least = "0 (off) or more" if name == "refills" else "at least 1"
                raise ConfigError(f"rollout.shape.{name}={value}: must be {least}")
        if self.prompts_per_round % self.minibatches:
            raise ConfigError(
                f"rollout.shape.prompts_per_round={self.prompts_per_round} is not divisible by "
                f"rollout.shape.minibatches={self.minibatches}: whole groups are dealt to optimizer steps"
            )
        self.check_ranks(1)

    def check_ranks(self, size: int) -> None:
        """Raises ConfigError if an optimizer step cannot be cut evenly for so many processes."""
        rows = self.prompts_per_round // self.minibatches * self.group_size
        if rows % (self.micro_batches * size):
            times = f" times {size} processes" if size > 1 else ""
            raise ConfigError(
                f"{rows} sequences per optimizer step (prompts_per_round * group_size / minibatches) are not divisible "
                f"by micro_batches={self.micro_batches}{times}; valid: a divisor of {rows}"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps per round."""
        return self.epochs * self.minibatches

    @property
    def batches(self) -> int:
        """Micro-batches per round, of each process."""
        return self.updates * self.micro_batches


@dataclass(frozen=True)
class Stages:
    """What a round calls, in this order. Each is a plain callable, so that the loop knows no engine and no model.

    Args:
        push: the policy's weights, as version r, to the engine.
        generate: (prompts, seeds, sample numbers) -> completions.
        score: (prompts, completions) -> Scores; of several processes each calls it for its share.
        assess: `Objective.assess`.
        old_logprobs: may be None when a round has a single update: the new log-probs, detached, are the old ones.
        ref_logprobs: of the reference or teacher.
        values: of the critic.
        greedy: prompts -> their greedy completions, for an objective that compares with them.
        informative: (values_BR, weights_R, group_B, valid_B) -> bool (B,), rows of groups with a signal (`refills`).
        mismatch: batch -> KL(engine || trainer), 0-d; asked where `old_logprobs` are.
        check: raises when too many of a round's verifiers failed; given the scores of all that it generated.
    """

    push: Callable[[int], None]
    generate: Callable[[Sequence[Prompt], Sequence[int], Sequence[int]], list[Completion]]
    score: Callable[[Sequence[Prompt], Sequence[Completion]], Scores]
    assess: Callable[..., Assessed]
    old_logprobs: Callable[[PolicyBatch], Tensor] | None = None
    ref_logprobs: Callable[[PolicyBatch], Tensor] | None = None
    values: Callable[[PolicyBatch], Tensor] | None = None
    greedy: Callable[[Sequence[Prompt]], list[Completion]] | None = None
    informative: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    mismatch: Callable[[PolicyBatch], Tensor] | None = None
    check: Callable[[Scores], None] | None = None


@dataclass(frozen=True)
class Round:
    """What a finished rollout tells its listeners.

    Args:
        groups: those that are learnt from.
        advantages_B: mean advantage of each of their completions.
        tokens: generated in the round, for dropped groups too.
        metrics: rewards, lengths, and the time that each part took.
    """

    index: int
    groups: Sequence[RolloutGroup]
    advantages_B: Tensor
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
