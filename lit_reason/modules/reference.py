"""What the policy is held to, or learns from: a frozen copy, a moving one, its own base, or a teacher.

| reference   | its weights                                                        | memory                        |
|-------------|--------------------------------------------------------------------|-------------------------------|
| frozen      | the policy's at the start of the run                               | a copy; none under adapters   |
| refreshed   | the policy's at the start of every n-th round                      | a copy                        |
| ema         | an exponential moving average of the policy's                      | a copy                        |
| teacher     | another model's, with the same tokenizer                           | that model                    |
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lit_reason.errors import CheckpointError, ConfigError
from lit_reason.models import CausalLM
from lit_reason.models.adapters import adapters, adapters_off
from lit_reason.models.checksum import base_checksum, checksum


class Reference(ABC):
    """A model whose log-probs the policy is compared with. Never trained, never in train mode.

    It is not a submodule of the policy's module: `bind` hands it the policy, and the checkpoint gets `state_dict`.
    """

    rule = ""

    def bind(self, policy: nn.Module) -> None:
        """Called once, with the policy at the start of the run."""
        if adapters(policy):
            raise ConfigError(
                f"reference={type(self).__name__.lower()}: a policy with adapters is its own frozen reference, with "
                "the adapters off. Type reference=frozen, or adapter=none"
            )
        self._model = _frozen(copy.deepcopy(policy))

    @contextmanager
    def model(self) -> Iterator[CausalLM]:
        """The model to compute with, in eval mode."""
        yield cast(CausalLM, self._model)

    def models(self) -> list[nn.Module]:
        """Models of its own, which are to compute with the policy's kernels."""
        return [self._model]

    def to(self, device: torch.device) -> None:
        self._model.to(device)

    def after_step(self, policy: nn.Module) -> None:
        """Called after every optimizer step."""
        return

    def before_round(self, policy: nn.Module, index: int) -> None:
        """Called before round `index` is generated."""
        return

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to have the same reference: tensors, or the checksum of what it will bind again."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rule"] != self.rule:
            raise CheckpointError(f"the checkpoint's reference is {state['rule']!r}, this run's is {self.rule!r}")


class Frozen(Reference):
    """The policy as it was at the start of the run. A policy with adapters needs no copy: its base is the reference."""

    rule = "frozen at the start of the run"

    def bind(self, policy: nn.Module) -> None:
        self._base = policy if adapters(policy) else None
        if self._base is None:
            super().bind(policy)
            self._checksum = checksum(self._model)
        else:
            self._checksum = base_checksum(policy)

    @contextmanager
    def model(self) -> Iterator[CausalLM]:
        if self._base is None:
            yield cast(CausalLM, self._model)
            return
        training = self._base.training
        self._base.eval()
        try:
            with adapters_off(self._base):
                yield cast(CausalLM, self._base)
        finally:
            self._base.train(training)

    def models(self) -> list[nn.Module]:
        return super().models() if self._base is None else []

    def to(self, device: torch.device) -> None:
        if self._base is None:
            super().to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule, "sha256": self._checksum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["sha256"] != self._checksum:
            raise CheckpointError(
                f"the checkpoint's reference policy is {state['sha256'][:12]}, this run's is {self._checksum[:12]}: "
                "resume from the same initial weights, or start a new run (resume=never)"
            )


class _Moving(Reference):
    """A copy whose weights the checkpoint holds."""

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule, "weights": self._model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._model.load_state_dict(state["weights"])

    @torch.no_grad()
    def _blend(self, policy: nn.Module, share: float) -> None:
        """own += share * (policy - own), for every parameter; buffers are copied."""
        for own, new in zip(self._model.parameters(), policy.parameters(), strict=True):
            own.lerp_(new.detach().to(own), share)
        for own, new in zip(self._model.buffers(), policy.buffers(), strict=True):
            own.copy_(new)


class Refreshed(_Moving):
    """The policy as it was at the start of every `every`-th round (RPG's iterative reference, arXiv 2505.17508)."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigError(
                f"reference.every={every}: rounds between two refreshes, 1 or more. Type reference.every=20"
            )
        self.every, self.rule = every, f"the policy of every {every}. round"

    def before_round(self, policy: nn.Module, index: int) -> None:
        if index % self.every == 0:
            self._blend(policy, 1.0)


class EMA(_Moving):
    """own = decay * own + (1 - decay) * policy after every optimizer step, in float32: bfloat16 would not move."""

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"reference.decay={decay}: must be at least 0 and below 1. Type reference.decay=0.99")
        self.decay, self.rule = decay, f"moving average of the policy, decay {decay} per step"

    def bind(self, policy: nn.Module) -> None:
        super().bind(policy)
        self._model.float()

    def after_step(self, policy: nn.Module) -> None:
        self._blend(policy, 1 - self.decay)


class Teacher(Frozen):
    """Another model, e.g. `arith-1m.gdpo` of the zoo, or `dir:PATH` of a saved one, ours or Hugging Face's.

    Args:
        name: what `load` is given.
    """

    rule = "a teacher"

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, load: Callable[[str], nn.Module]) -> None:
        """Fetches the model; `load` knows the zoo and refuses another tokenizer."""
        self._model = _frozen(load(self.name))

    def bind(self, policy: nn.Module) -> None:
        self._base = None
        own, its = (cast(CausalLM, model).config.vocab_size for model in (policy, self._model))
        if own != its:
            raise ConfigError(f"reference.name={self.name}: the teacher has {its} token ids, the policy {own}")
        self._checksum = checksum(self._model)


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()
