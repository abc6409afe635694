"""Records that cross stages, and the shape legend used in every file.

Shape suffixes (`rewards_BR` is a tensor of shape (B, R)):

    P  prompts of a round            T  tokens (padded)        E  experts
    G  completions per prompt        D  model width            K  chosen experts
    B  sequences, B = P * G          H  heads                  R  rewards (columns of the rubric)
    N  tokens, flattened             V  vocabulary             S  cached positions

The way of the data:

    prompt -> rollout -> reward -> advantage -> batch -> loss -> optimizer step -> weight sync
    Prompt    Completion Scores    PolicyBatch.advantages_BT
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, rendered and tokenised.

    Args:
        id: 16 hex digits of the hash of the canonical question; the same question has the same id everywhere.
        question: the problem as its source words it, without any template.
        answer: the reference answer, `""` if the verifier needs none.
        source: where it comes from, e.g. `"reasoning_gym/chain_sum"`, `"gsm8k"`, `"jsonl/mine"`.
        token_ids: the question in the chat template, ready for generation.
        meta: JSON-able facts for verifiers and tables (difficulty, a reasoning-gym entry, ...).
    """

    id: str
    question: str
    answer: str
    source: str
    token_ids: tuple[int, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    Args:
        prompt_id: `Prompt.id` of the problem.
        sample_idx: 0 .. G-1 within the group.
        token_ids: what was generated, the stop token included when `finish_reason == "stop"`.
        logprobs: the *engine's* log-probability of each token under the sampling temperature (nats).
        text: `token_ids` decoded, without the stop token.
        finish_reason: `"stop"` for a stop token, or where an environment ended it; `"length"` when `max_tokens`, the
            context or an environment's number of turns was used up.
        version: the policy version whose weights generated it; of several, that of its first token.
        seed: the request's counter seed; the same seed and weights give the same tokens.
        mask: 1 for tokens that the policy wrote, 0 for those of an environment; None if it wrote all.
        experts_SLK: int16, the experts chosen for each of the S = prompt + completion - 1 tokens that the engine read,
            in each of L MoE layers; -1 where it does not know. None from an engine that does not tell.
        switches: (token, version) for each change of weights while it was generated: from that token on.
        fault: why its environment failed, `""` if it did not; a completion with a fault is never scored.
    """

    prompt_id: str
    sample_idx: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    version: int
    seed: int
    mask: tuple[int, ...] | None = None
    experts_SLK: Tensor | None = field(default=None, compare=False)  # == of tensors is no bool
    switches: tuple[tuple[int, int], ...] = ()
    fault: str = ""


class RewardState(IntEnum):
    """What a verifier said of a completion: an error or a time-out is a state, never a silent 0."""

    OK = 0
    ERROR = 1
    TIMEOUT = 2


@dataclass(frozen=True, slots=True)
class Scores:
    """The rubric's columns for B completions.

    Args:
        names: R reward names, the columns' order.
        weights_R: weight of each reward, float32.
        values_BR: float32; NaN wherever `states_BR` is not `RewardState.OK`.
        states_BR: int64, values of `RewardState`.
        messages: `{(row, name): text}` for the entries that are not OK.
    """

    names: tuple[str, ...]
    weights_R: Tensor
    values_BR: Tensor
    states_BR: Tensor
    messages: Mapping[tuple[int, str], str] = field(default_factory=dict)

    @property
    def valid_B(self) -> Tensor:
        """bool (B,): rows whose every reward is OK."""
        return (self.states_BR == RewardState.OK).all(dim=1)

    @property
    def total_B(self) -> Tensor:
        """float32 (B,): the weighted sum of the columns; NaN in rows that are not valid."""
        return self.values_BR @ self.weights_R


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G completions of one prompt, with their scores (G rows), and those of its greedy completion (one), if any."""

    prompt: Prompt
    completions: Sequence[Completion]
    scores: Scores
    greedy: Scores | None = None


class Assessed(NamedTuple):
    """What an objective says of each token before the update.

    Args:
        advantages: (B, T); of a single choice of the advantage axis also (B,), for all tokens of a sequence.
        returns_BT: what the critic should have said; None without a critic.
        marked_BT: bool, tokens that a surrogate treats in another way (`kl_cov`); None where none does.
    """

    advantages: Tensor
    returns_BT: Tensor | None = None
    marked_BT: Tensor | None = None


@dataclass(slots=True)
class PolicyBatch:
    """One micro-batch of the policy update. Everything per token is aligned with `target_ids_BT`.

    Sequences are prompt + completion, padded on the right. `target_ids_BT[b, t]` is the token after
    `input_ids_BT[b, t]`; `mask_BT` is 1 where the target is a completion token that counts.
    The three `*_total` scalars are over the whole *optimizer step* (all micro-batches, all ranks): the aggregation
    divides by them, so that splitting a batch never changes its gradient.

    Args:
        input_ids_BT, target_ids_BT: int64.
        mask_BT: float32, 0 or 1.
        advantages_BT: float32, constant along a sequence unless the algorithm has token-level advantages.
        rollout_logprobs_BT: the engine's log-probs (mu), 0 where masked; NaN where the engine gave none.
        old_logprobs_BT: the trainer's own at the round's start; None means "this is the round's only update",
            so that old == new.detach() exactly.
        ref_logprobs_BT: the reference's (or the teacher's); None when no KL term asks for it.
        values_BT: the critic's at the round's start; returns_BT: what it should have said. None without a critic.
        marked_BT: bool, tokens that the surrogate treats apart; None where none does.
        experts_BTLK: int16, the experts that the engine chose for each input token in each of L MoE layers, to be
            replayed; -1 where the trainer chooses. None: it chooses everywhere.
        mismatch_kl: 0-d, KL(engine || trainer) per token over the whole round; None when old_logprobs_BT is.
        group_tokens_B: number of masked-in tokens of the sequence's whole group (prompt-mean-token-mean).
        sequences_total, tokens_total, prompts_total: float32 scalars (0-d), see above.
        max_completion: the generation limit in tokens (Dr.GRPO's constant L_max).
    """

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    mask_BT: Tensor
    advantages_BT: Tensor
    rollout_logprobs_BT: Tensor
    group_tokens_B: Tensor
    sequences_total: Tensor
    tokens_total: Tensor
    prompts_total: Tensor
    max_completion: Tensor
    old_logprobs_BT: Tensor | None = None
    ref_logprobs_BT: Tensor | None = None
    values_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    marked_BT: Tensor | None = None
    experts_BTLK: Tensor | None = None
    mismatch_kl: Tensor | None = None

    def to(self, device: torch.device | str, **kwargs: Any) -> PolicyBatch:
        """A copy on `device` (Lightning calls this to move batches)."""
        moved = {
            f.name: value.to(device, **kwargs)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return self.input_ids_BT.shape[0]


@dataclass(slots=True)
class TokenBatch:
    """One batch of supervised text: `target_ids_BT` is the next token, `mask_BT` is 1 where it counts in the loss."""

    input_ids_BT: Tensor
    target_ids_BT: Tensor
    mask_BT: Tensor

    def to(self, device: torch.device | str, **kwargs: Any) -> TokenBatch:
        """A copy on `device`."""
        return TokenBatch(
            self.input_ids_BT.to(device, **kwargs),
            self.target_ids_BT.to(device, **kwargs),
            self.mask_BT.to(device, **kwargs),
        )

    def __len__(self) -> int:
        return self.input_ids_BT.shape[0]
