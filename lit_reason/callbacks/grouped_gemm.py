"""Experts with stacked weights as one product per matrix instead of a loop over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lit_kernels.dispatch import choose
from lit_kernels.fp8 import Scales
from lit_kernels.gemm import check_product
from lit_kernels.grouped import experts
from lit_kernels.linear import unsupported
from lit_kernels.swap import Swap
from torch import Tensor, nn

from lit_reason.callbacks.fp8_linear import check_fp8, too_small
from lit_reason.callbacks.swapping import Change, Swapping, plain_forward, swapped
from lit_reason.errors import ConfigError
from lit_reason.models.layers import compute_dtype
from lit_reason.models.moe import Experts, Routing


class Call(NamedTuple):
    """What one call of a module of experts asks for: the sum over k of weight_k * down(activation(gate x) * up x).

    Shapes: N tokens, K chosen, E experts, D width, F expert width."""

    x_ND: Tensor
    experts_NK: Tensor
    weights_NK: Tensor
    gate_up_EFD: Tensor  # (E, 2F, D), the gate's rows first
    down_EDF: Tensor
    activation: Callable[[Tensor], Tensor] = F.silu


Layout = Callable[..., Call]  # (module, *arguments of its forward) -> Call


def ours(module: Experts, x_ND: Tensor, routing: Routing) -> Call:
    return Call(x_ND, routing.experts_NK, routing.weights_NK, module.gate_up, module.down)


def transformers_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Call:
    """Mixtral, Qwen-MoE, DeepSeek, GLM, ...: every class under `use_experts_implementation` with gates, without
    biases."""
    silu = isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
    activation = F.silu if silu else module.act_fn  # the name by which the kernels know it
    return Call(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, activation)


class Grouped(Swap):
    """Put on a module of experts; see `GroupedGEMM`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        layout, backend, precision, kind = self.swap_settings[Grouped].values()  # type: ignore[attr-defined]
        call: Call = layout(self, *args, **kwargs)
        dtype = compute_dtype(call.x_ND)
        out_ND = experts(
            call.x_ND.to(dtype),
            call.experts_NK,
            call.weights_NK,
            call.gate_up_EFD.to(dtype),
            call.down_EDF.to(dtype),
            call.activation,
            backend=backend,
            precision=precision,
            kind=kind,
        )
        return out_ND.to(call.x_ND.dtype)


class GroupedGEMM(Swapping):
    """Computes experts by grouped products: ours, those of transformers (Mixtral, Qwen-MoE, DeepSeek, ...), and classes
    of your own that `layouts` describes. Weights must be stacked: (E, 2F, D) and (E, D, F).

    Args:
        backend: `"auto"` (what was measured to be faster on this GPU), `"torch"` (`F.grouped_mm`), `"triton"`; of FP8
            also `"emulate"`, the same numbers on any device.
        precision: `"bf16"`, which stands for the dtype of the run, or `"fp8"`.
        scales: of FP8, `"float"` or `"power of two"`.
        min_features: of FP8: experts with fewer inputs or hidden units stay in bf16.
        layouts: {class: function that makes a `Call` of the module and its forward's arguments}.

    Example::

        Trainer(callbacks=[GroupedGEMM()])
        GroupedGEMM(layouts={MyExperts: lambda m, x, index, weights: Call(x, index, weights, m.w13, m.w2)})

    YAML::

        grouped_gemm:
          _target_: lit_reason.callbacks.GroupedGEMM
    """

    def __init__(
        self,
        backend: str = "auto",
        precision: str = "bf16",
        scales: Scales = "float",
        min_features: int = 2048,
        layouts: Mapping[type[nn.Module], Layout] | None = None,
    ) -> None:
        check_fp8(type(self).__name__, backend, scales, min_features)
        if precision not in ("bf16", "fp8"):
            raise ConfigError(f"GroupedGEMM got precision={precision!r}; valid: bf16, fp8")
        if backend == "emulate" and precision != "fp8":
            raise ConfigError("GroupedGEMM got backend='emulate' without FP8 to emulate. Type precision='fp8'")
        self.backend, self.precision, self.scales = backend, precision, scales
        self.min_features, self.layouts = min_features, dict(layouts or {}) | {Experts: ours}

    def try_on(self, device: torch.device) -> None:
        if self.precision == "fp8":
            check_product(self.backend, device)
        else:
            choose("grouped_mm", self.backend, device, ())

    def changes(self, model: nn.Module) -> Iterator[Change]:
        for name, module in model.named_modules():
            layout, reason = self._layout(module)
            if reason:
                yield Change(name, module, reason)
            elif layout is not None:
                yield self._grouped(name, module, layout)

    def _layout(self, module: nn.Module) -> tuple[Layout | None, str]:
        """How to read a module of experts, or why it is declined; neither if it is something else."""
        for kind, layout in self.layouts.items():
            if isinstance(module, kind):
                return layout, ""
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and hasattr(module, "is_concatenated"):
            reason = _not_ours(module)
            return (None, reason) if reason else (transformers_experts, "")
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(_is_gated(expert) for expert in module):
            return None, "its weights are one tensor per expert; GroupedGEMM takes stacked ones"
        return None, ""

    def _grouped(self, name: str, module: nn.Module, layout: Layout) -> Change:
        precision, note = self.precision, ""
        if precision == "fp8":
            matrices = [p.shape[1:] for p in module.parameters() if p.dim() == 3]
            reasons = (unsupported(N, K) or too_small(N, K, self.min_features) for N, K in matrices)
            note = next(filter(None, reasons), "")
            precision = "bf16" if note else "fp8"
        backend = "auto" if self.backend == "emulate" and precision == "bf16" else self.backend
        what = f"grouped products, {precision}, {backend}" + (f" ({note})" if note else "")
        settings = {"layout": layout, "backend": backend, "precision": precision, "kind": self.scales}
        return swapped(name, module, what, Grouped, **settings)

    def missing(self) -> str:
        return (
            "GroupedGEMM found no experts with stacked weights and does nothing. Drop it (kernels=torch), or describe "
            "yours: GroupedGEMM(layouts={MyExperts: lambda m, x, index, weights: Call(x, index, weights, m.w13, m.w2)})"
        )


def _not_ours(module: Any) -> str:
    """Why experts of transformers are not computed by `experts`; empty if they are."""
    from transformers.integrations.moe import _default_apply_gate

    if not module.has_gate or module.has_bias or module.is_transposed or not module.is_concatenated:
        return "its experts have biases, no gate, or weights in another layout"
    if type(module)._apply_gate is not _default_apply_gate:
        return "its gate is no activation(gate) * up"
    names = list(inspect.signature(plain_forward(module)).parameters)[1:]
    if len(names) != 3:
        return f"its forward takes {', '.join(names)}, not tokens, experts and weights"
    return ""


def _is_gated(module: nn.Module) -> bool:
    """Whether its linear layers are a gate, an up and a down."""
    shapes = [tuple(child.weight.shape) for child in module.children() if isinstance(child, nn.Linear)]
    return len(shapes) == 3 and sorted(shapes) in (sorted([s, s, s[::-1]]) for s in shapes)
