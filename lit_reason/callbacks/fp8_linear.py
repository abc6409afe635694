"""Linear layers whose three products run in FP8, as DeepSeek-V3 was trained (2412.19437 section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lit_kernels.fp8 import Scales
from lit_kernels.gemm import check_product
from lit_kernels.linear import fp8_linear, unsupported
from lit_kernels.swap import Swap
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lit_reason.callbacks.swapping import (
    HEADS,
    Change,
    Swapping,
    matches,
    output_heads,
    patterns,
    plain_forward,
    swapped,
)
from lit_reason.errors import ConfigError

KEPT = (*HEADS, "score", "router", "gate", "*_gate", "*.lora_*")


class FP8(Swap):
    """Put on an `nn.Linear`; see `FP8Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, nn.Linear)
        settings: dict[str, Any] = self.swap_settings[FP8]  # type: ignore[assignment, index]
        return fp8_linear(x, self.weight, self.bias, **settings)


class FP8Linear(Swapping):
    """Puts forward, input-gradient and weight-gradient products of `nn.Linear` layers into E4M3: activations and their
    gradients scaled 1 x 128, weights 128 x 128. Weights, gradients and optimizer state keep their dtype.

    As in DeepSeek-V3 embeddings, output heads, gates, norms and the attention itself stay as they are: a layer whose
    weight has an embedding's shape counts as a head, and `keep` names the gates. Layers that are
    too small to gain from FP8, LoRA's matrices among them, are declined. The report says which.

    Experts with stacked weights are no `nn.Linear`: `GroupedGEMM(precision="fp8")`.

    Args:
        backend: `"auto"` (what was measured to be faster on this GPU), `"torch"` (cuBLAS by `F.scaled_mm`), `"triton"`;
            `"emulate"` computes the same numbers on any device, slower than without FP8.
        scales: `"float"`, or `"power of two"`.
        min_features: layers with fewer inputs or fewer outputs are declined; 0 takes all. Layers of 2048 x 1408 lose
            time on large GPUs.
        keep: shell patterns of names to leave alone, full or last part.

    Example::

        Trainer(callbacks=[FP8Linear()])

    YAML::

        fp8_linear:
          _target_: lit_reason.callbacks.FP8Linear
    """

    def __init__(
        self,
        backend: str = "auto",
        scales: Scales = "float",
        min_features: int = 2048,
        keep: Sequence[str] = KEPT,
    ) -> None:
        check_fp8(type(self).__name__, backend, scales, min_features)
        self.settings = {"backend": backend, "kind": scales}
        self.min_features, self.keep = min_features, patterns(type(self).__name__, "keep", keep)

    def try_on(self, device: torch.device) -> None:
        check_product(self.settings["backend"], device)

    def changes(self, model: nn.Module) -> Iterator[Change]:
        heads = output_heads(model)
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if reason := "an output head stays as it is" if module in heads else self._declined(name, module):
                yield Change(name, module, reason)
            else:
                yield swapped(name, module, f"FP8, {self.settings['backend']}", FP8, **self.settings)

    def _declined(self, name: str, module: nn.Linear) -> str:
        if matches(name, self.keep):
            return "keep names it"
        if plain_forward(module) is not nn.Linear.forward:
            return f"a {type(module).__name__} has a forward of its own"
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight, and does not call it"
        N, K = module.weight.shape
        return unsupported(N, K) or too_small(N, K, self.min_features)

    def missing(self) -> str:
        return "FP8Linear found no nn.Linear that it could change. FP8Linear(min_features=0) takes small ones too"


def too_small(N: int, K: int, least: int) -> str:
    """Why a weight (N, K) is declined for its size; empty if it is not."""
    return f"{N} x {K} is below min_features={least}" if min(N, K) < least else ""


def check_fp8(callback: str, backend: str, scales: str, min_features: int) -> None:
    """ConfigError for settings that FP8 does not have."""
    if not isinstance(min_features, int) or min_features < 0:
        raise ConfigError(f"{callback} got min_features={min_features!r}; valid: a whole number of 0 or more")
    for key, got, valid in (
        ("backend", backend, ("auto", "torch", "triton", "emulate")),
        ("scales", scales, ("float", "power of two")),
    ):
        if got not in valid:
            raise ConfigError(f"{callback} got {key}={got!r}; valid: {', '.join(valid)}")
