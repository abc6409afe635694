"""The engine protocol: what RL asks of whatever generates, and what a proof of its weights asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lit_reason.errors import RolloutError
from lit_reason.models.checksum import digest
from lit_reason.rollout.sampling import Sampling
from lit_reason.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a generation stands: `done` of `total` completions, `tokens` generated in `seconds`."""

    done: int
    total: int
    tokens: int
    seconds: float


OnProgress = Callable[[Progress], None]


@runtime_checkable
class Engine(Protocol):
    """Generates with the weights it was last pushed."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int],
        sample_idx: Sequence[int] | None = None,
        progress: OnProgress | None = None,
    ) -> list[Completion]:
        """One completion per entry of `prompts`, in their order; for G samples of a prompt repeat it G times."""
        ...

    def push(self, model: nn.Module, version: int) -> None:
        """Takes over `model`'s weights and buffers as policy `version`."""
        ...

    def version(self) -> int:
        """The version last pushed, -1 before the first."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as an engine holds it: its dtype, shape and `lit_reason.models.checksum.digest`.

    Args:
        digest: of `plain(tensor)`.
        learnt: a parameter: a push must bring it.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: int
    learnt: bool = False


@dataclass(frozen=True, slots=True)
class NextToken:
    """What an engine says of the token after a prompt.

    Args:
        logprobs: of the likeliest tokens (nats), by token id.
        cached: how many of the prompt's tokens it took from its cache.
    """

    logprobs: Mapping[int, float]
    cached: int


@runtime_checkable
class Provable(Engine, Protocol):
    """An engine that can be asked what it holds (`lit_reason.sync.Proof`).

    Attributes:
        dtype: in which it computes.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def prefix_block(self) -> int:
        """Tokens per block of its prefix cache; 0 if it keeps none from one call to the next."""
        ...

    def truth(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What it must hold of `model`, by the names of `held`. Not what it sends: a push that leaves out adapters or
        rounds a buffer would agree with itself."""
        ...

    def held(self) -> Mapping[str, Held]:
        """Every parameter and buffer that it holds; what it derived from another, under that one's name, a blank and a
        word; what no push changes, under a name that `truth` does not have."""
        ...

    def next_token(self, prompts: Sequence[Sequence[int]], top: int) -> list[NextToken]:
        """The `top` likeliest tokens after each prompt, at temperature 1; an engine in several places answers for all
        prompts in one place after another."""
        ...


def check_requests(
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    context: int | None = None,
    limits: Sequence[int] | None = None,
) -> None:
    """RolloutError unless every prompt has a seed, a limit of its own if there are `limits`, and room for an answer in
    a model of `context` tokens."""
    if len(seeds) != len(prompts):
        raise RolloutError(f"got {len(prompts)} prompts and {len(seeds)} seeds: one seed per completion is needed")
    if limits is not None and (len(limits) != len(prompts) or min(limits, default=1) < 1):
        raise RolloutError(
            f"got {len(prompts)} prompts and {len(limits)} limits, the least {min(limits, default=0)}: one limit per "
            "completion is needed, of at least 1 token"
        )
    for prompt in prompts:
        if context is not None and not 0 < len(prompt.token_ids) < context:
            raise RolloutError(
                f"prompt {prompt.id} has {len(prompt.token_ids)} tokens; valid 1..{context - 1} "
                f"(model.max_seq_len={context} leaves at least one token for the answer)"
            )


def most_tokens(
    prompts: Sequence[Prompt], sampling: Sampling, context: int, limits: Sequence[int] | None = None
) -> list[int]:
    """How many tokens each completion may have: `sampling.max_tokens`, its own limit, and what the context leaves."""
    return [
        min(most, sampling.max_tokens, context - len(prompt.token_ids))
        for prompt, most in zip(prompts, [context] * len(prompts) if limits is None else limits, strict=True)
    ]


def plain(tensor: Tensor) -> Tensor:
    """With 0 for -0 and for what is below the dtype's normal range: an engine that can show a weight only by computing
    with it may drop either."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.masked_fill(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0.0)


def held_as_is(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Held]:
    """What is held in the shape in which it was sent."""
    return {name: _held(name, tensor) for name, tensor in tensors}


def _held(name: str, tensor: Tensor) -> Held:
    learnt = isinstance(tensor, nn.Parameter) or name.split(" ")[0].endswith(".weight")
    return Held(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest(plain(tensor)), learnt)
