"""Log-probs, entropies and cross-entropy straight from the output head's input, without logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from lit_kernels.dispatch import Backend, choose
from lit_kernels.lazy_logits import LazyLogits
from lit_kernels.logprobs import linear_logprobs
from lit_kernels.swap import Swap
from torch import Tensor, nn

from lit_reason.callbacks.swapping import Change, Swapping, matches, output_heads, patterns, plain_forward, swapped
from lit_reason.errors import ConfigError


class LazyHead(Swap):
    """Put on an output head; see `FusedLogProb`. In training its logits are computed only if somebody looks at them."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, nn.Linear)
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)  # type: ignore[misc]
        return LazyLogits(x, self.weight, backend=self.swap_settings[LazyHead]["backend"])  # type: ignore[index]

    def logprobs(self, states_MD: Tensor, target_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log p(target) and entropy, (M,) float32."""
        assert isinstance(self, nn.Linear)
        backend: str = self.swap_settings[LazyHead]["backend"]  # type: ignore[index]
        return linear_logprobs(states_MD, self.weight, target_M, temperature, backend=backend)


class FusedLogProb(Swapping):
    """Output heads whose losses never hold the logits of all tokens: a (tokens, vocabulary) tensor is the largest of a
    training step. The loss is computed tile by tile from states and weight, and again in the backward pass.

    In training the head returns logits that are not there yet. `F.cross_entropy`, and with it the losses of
    transformers, takes what it needs from the states; anything else that looks at them (argmax, softmax, a slice of the
    vocabulary) computes them. Our own policies ask the head for log-probs and entropies.

    Args:
        backend: `"auto"` (what was measured to be faster on this GPU), `"torch"`, `"triton"`.
        heads: shell patterns of the heads' names, full or last part; empty: linear layers without a bias whose
            weight has the shape of an embedding's.

    Example::

        Trainer(callbacks=[FusedLogProb()])

    YAML::

        fused_logprob:
          _target_: lit_reason.callbacks.FusedLogProb
    """

    def __init__(self, backend: str = "auto", heads: Sequence[str] = ()) -> None:
        if backend not in get_args(Backend):
            raise ConfigError(f"FusedLogProb got backend={backend!r}; valid: {', '.join(get_args(Backend))}")
        self.backend, self.heads = backend, patterns(type(self).__name__, "heads", heads)

    def try_on(self, device: torch.device) -> None:
        choose("linear_logprobs", self.backend, device, ())

    def changes(self, model: nn.Module) -> Iterator[Change]:
        heads = output_heads(model)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (matches(name, self.heads) if self.heads else module in heads):
                if module.bias is not None:
                    yield Change(name, module, "it has a bias")
                elif plain_forward(module) is not nn.Linear.forward:
                    yield Change(name, module, f"a {type(module).__name__} has a forward of its own")
                else:
                    what = f"losses without logits, {self.backend}"
                    yield swapped(name, module, what, LazyHead, backend=self.backend)

    def missing(self) -> str:
        return "FusedLogProb found no output head without a bias. Type FusedLogProb(heads=['lm_head'])"
