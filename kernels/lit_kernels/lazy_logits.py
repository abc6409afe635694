"""Logits of a head without a bias that are not there until somebody looks.

    logits = LazyLogits(states, head.weight)                                  # (B, T, V), as head(states)
    F.cross_entropy(logits[:, :-1].float().reshape(-1, V), labels.flatten())  # by linear_logprobs: no (N, V) tensor
    logits.softmax(-1)                                                        # computed here, and kept

Nothing is computed to tell shape, dtype and the like, to select or arrange rows, to widen to float32, to detach, and
for the cross-entropy of token indices (no class weights, no smoothing). The likeliest token is found some rows at a
time. Anything else computes the logits, as they were when they were made (autocast, gradients), keeps them, and goes on
with a plain tensor.

Autograd sees what plain logits show it: `requires_grad`, and a `grad_fn` that leads to states and weight. What looks
below `__torch_function__` (an autograd function's `apply`, as of DDP's sink or of full backward hooks) gets the
numbers, and its gradient finds its way.

Traps:
- A target outside 0 .. V-1 that is not ignored gives NaN, where plain logits raise.
- Logits are computed from the weight: once an optimiser has changed it, they are gone, and reading them raises.
- A hook or a change in place would be lost on slices and losses that were made before it: it raises after the first.
  Hooks of torch.distributed (FSDP2 gathers weights by one) work, and run before the loss's backward pass needs them.
- `torch.compile` cannot hold such a tensor: inside, plain logits are made. So are those of sharded or quantised weights
  (subclasses of tensors).

Shapes: N rows, M of them count; V vocabulary, D width."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lit_kernels.logprobs import linear_logprobs

HALVES = (torch.bfloat16, torch.float16)
AT_ONCE = 2**22  # logits that exist together where only their largest is asked for


@dataclass
class _Head:
    """What the logits of one call share with their slices."""

    weight_VD: Tensor
    backend: str
    product: torch.dtype  # of states @ weight.T
    autocast: bool
    inference: bool
    version: int | None
    used: bool = False  # a slice was taken, or a loss
    hooks: OrderedDict[int, Callable[[Tensor], Any]] = field(default_factory=OrderedDict)  # of torch.distributed

    def values(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.to(self.product), self.weight_VD.to(self.product)).to(dtype)

    def add_hook(self, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def run_hooks(self, grad: Tensor) -> None:
        for hook in list(self.hooks.values()):
            hook(grad)


@dataclass
class _Place:
    """What logits share with their node in autograd's graph."""

    changed: bool = False


class LazyLogits(Tensor):
    """states @ weight.T, (..., V), once somebody looks; see above.

    Args:
        states: (..., D).
        weight_VD: the head's; it may be freed and come back (FSDP2), but not change.
        backend: of `linear_logprobs`.

    Raises:
        ValueError: the widths differ, or the dtypes without autocast.
    """

    states: Tensor
    head: _Head
    tracked: bool
    version: int | None
    kept: Tensor | None
    place: _Place

    def __new__(cls, states: Tensor, weight_VD: Tensor, backend: str = "auto") -> Any:
        plain = type(states) is Tensor and type(weight_VD) in (Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain:
            return F.linear(states, weight_VD)
        kind = states.device.type
        autocast = torch.is_autocast_enabled(kind) and states.dtype != torch.float64
        if states.shape[-1:] != weight_VD.shape[1:] or not (autocast or states.dtype == weight_VD.dtype):
            got = f"states {tuple(states.shape)} {states.dtype}, weight {tuple(weight_VD.shape)} {weight_VD.dtype}"
            raise ValueError(f"got {got}; valid: (..., D) and (V, D) of one dtype, or autocast")
        product = torch.get_autocast_dtype(kind) if autocast else states.dtype
        inference = torch.is_inference_mode_enabled()
        head = _Head(weight_VD, backend, product, autocast, inference, _version(weight_VD))
        return _lazy(states, head, product, torch.is_grad_enabled())

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def materialise(self) -> Tensor:
        """The logits, computed when first asked for."""
        if self.kept is None:
            self.check()
            with torch.inference_mode(self.head.inference), torch.set_grad_enabled(self.tracked):
                self.kept = self.head.values(self.states, self.dtype)
            if self.kept.requires_grad:
                self.kept.register_hook(self.head.run_hooks)
        return self.kept

    def check(self) -> None:
        """Raises RuntimeError if the logits can no longer be computed."""
        weight_VD = self.head.weight_VD
        if weight_VD.numel() and not weight_VD.untyped_storage().size():
            raise RuntimeError(
                "the head's weight was freed before its logits were read, as FSDP2 does after a forward pass. Type "
                "fully_shard(..., reshard_after_forward=False) for the module that holds the head"
            )
        if (self.head.version, self.version) != (_version(weight_VD), _version(self.states)):
            raise RuntimeError(
                "the head's weight or input was changed in place since these logits were made, and they were never "
                "computed. Read them before the optimiser's step, or type logits.materialise() in the training step"
            )

    def mark(self, name: str) -> None:
        """Something changes these logits and no others."""
        if self.head.used:
            raise RuntimeError(
                f"{name} of logits that slices or a loss were taken from, which would not see it. "
                "Type logits = logits.materialise() before these"
            )
        self.place.changed = True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        logits = args[0] if args else kwargs.get("input")
        if func is Tensor.register_hook and len(args) == 2 and _is_distributed(args[1]):
            return args[0].head.add_hook(args[1])
        if isinstance(logits, LazyLogits):
            if logits.kept is None:
                if func in METADATA:
                    with torch._C.DisableTorchFunctionSubclass():
                        return func(*args, **kwargs)
                if (known := LAZY.get(func)) and (out := known(*args, **kwargs)) is not NotImplemented:
                    return out
            if _leaves_a_mark(func):
                logits.mark(func.__name__)
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialise, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What did not come by `__torch_function__`; gradients are recorded above, by the wrapper's `grad_fn`."""
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would change logits that are not there. Type logits = logits.materialise()")
        args, kwargs = tree_map_only(LazyLogits, _values, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Lazy(torch.autograd.Function):
    """The place of lazy logits in autograd's graph: only a gradient of all logits comes by."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight_VD: Tensor, product: torch.dtype, dtype: torch.dtype, place: _Place
    ) -> Tensor:
        ctx.save_for_backward(states, weight_VD)
        ctx.product, ctx.place = product, place
        shape = (*states.shape[:-1], len(weight_VD))
        return Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=states.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        if ctx.place.changed:
            raise RuntimeError(
                "these logits were changed in place, or hooked. Type logits = logits.materialise() before"
            )
        states, weight_VD = ctx.saved_tensors
        grad_states = grad_weight = None
        with torch.autocast(states.device.type, enabled=False):
            grad = grad.to(ctx.product)
            if ctx.needs_input_grad[0]:
                grad_states = (grad @ weight_VD.to(ctx.product)).to(states.dtype)
            if ctx.needs_input_grad[1]:
                grad_NV, states_ND = grad.reshape(-1, len(weight_VD)), states.reshape(-1, states.shape[-1])
                grad_weight = (grad_NV.T @ states_ND.to(ctx.product)).to(weight_VD.dtype)
        return grad_states, grad_weight, None, None, None


def _lazy(states: Tensor, head: _Head, dtype: torch.dtype, tracked: bool) -> LazyLogits:
    place = _Place()
    with torch.set_grad_enabled(tracked):
        logits = _Lazy.apply(states, head.weight_VD, head.product, dtype, place)
    assert isinstance(logits, LazyLogits)
    logits.states, logits.head, logits.tracked, logits.kept = states, head, tracked, None
    logits.version, logits.place = _version(states), place
    with torch._C.DisableTorchFunctionSubclass():
        if logits.requires_grad:
            logits.register_hook(head.run_hooks)  # for a gradient that comes by `_Lazy`
    return logits


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _values(logits: LazyLogits) -> Tensor:
    if logits.kept is not None:
        return logits.kept.detach()
    logits.check()
    return logits.head.values(logits.states.detach(), logits.dtype)


def _of(logits: LazyLogits, states: Tensor, dtype: torch.dtype | None = None, tracked: bool = True) -> LazyLogits:
    """Other rows of the same head."""
    logits.head.used = True
    return _lazy(states, logits.head, dtype or logits.dtype, tracked and logits.tracked and torch.is_grad_enabled())


def _arranged(func: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function that keeps the order of elements, if it keeps rows whole."""

    def arranged(input: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        made = func(torch.empty(input.shape, dtype=input.dtype, device="meta"), *args, **kwargs)
        if made.dtype != input.dtype or made.shape[-1:] != input.shape[-1:]:
            return NotImplemented
        return _of(input, input.states.reshape(*made.shape[:-1], input.states.shape[-1]))

    return arranged


def _item(logits: LazyLogits, index: Any) -> Any:
    """An index of rows that leaves the last dimension whole and in its place."""
    entries = index if isinstance(index, tuple) else (index,)
    taken = [_dimensions(entry) for entry in entries]
    if None in taken or not entries:
        return NotImplemented
    last = entries[-1]
    after_dots = last is not Ellipsis and any(entry is Ellipsis for entry in entries)
    reaches_last = after_dots or sum(taken) >= logits.dim()  # type: ignore[arg-type]
    if reaches_last and not (isinstance(last, slice) and last == slice(None)):
        return NotImplemented
    return _of(logits, logits.states[index])


def _dimensions(entry: Any) -> int | None:
    """How many an index takes; None if it is of a kind that may do more."""
    if type(entry) is Tensor:
        return {torch.bool: entry.dim(), torch.int64: 1}.get(entry.dtype)
    if entry is Ellipsis:
        return 0
    return 1 if type(entry) is int or isinstance(entry, slice) else None


def _contiguous(input: LazyLogits, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    return input if memory_format == torch.contiguous_format else NotImplemented


def _float(input: LazyLogits, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    if memory_format not in (torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    return _to(input, torch.float32)


def _to(input: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """To the device and dtype that they have, or to float32: narrower ones would round."""
    if kwargs.get("copy") or "memory_format" in kwargs:
        return NotImplemented
    kwargs.pop("copy", None)
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
    if layout is not None or (device is not None and torch.empty(0, device=device).device != input.device):
        return NotImplemented
    if dtype in (None, input.dtype):
        return input
    return _of(input, input.states, dtype) if input.dtype in HALVES and dtype == torch.float32 else NotImplemented


def _detach(input: LazyLogits) -> Any:
    return _of(input, input.states.detach(), tracked=False)


def _argmax(input: LazyLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    """Along the vocabulary, some rows at a time; computed and not kept."""
    if dim is None or dim % input.dim() != input.dim() - 1:
        return NotImplemented
    input.check()
    states_ND, V = input.states.detach().reshape(-1, input.states.shape[-1]), input.shape[-1]
    parts = states_ND.split(max(AT_ONCE // max(V, 1), 1))
    best_N = torch.cat([input.head.values(part, input.dtype).argmax(-1) for part in parts])
    best = best_N.view(input.shape[:-1])
    return best.unsqueeze(-1) if keepdim else best


def _cross_entropy(
    input: LazyLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """By `linear_logprobs`, of the rows that count."""
    usual = weight is size_average is reduce is None and label_smoothing == 0 and reduction in ("mean", "sum", "none")
    indices = type(target) is Tensor and target.dtype == torch.int64 and target.device == input.device
    if not (usual and indices and input.dim() in (1, 2) and target.shape == input.shape[:-1]):
        return NotImplemented
    input.check()
    head, kind, narrow = input.head, input.device.type, input.dtype in HALVES
    head.used = True
    dtype = torch.float32 if narrow and torch.is_autocast_enabled(kind) else input.dtype
    states_ND, target_N = input.states.reshape(-1, input.states.shape[-1]), target.reshape(-1)
    counts_N = target_N != ignore_index
    cast = torch.autocast(kind, head.product if head.autocast else None, enabled=head.autocast)
    with cast, torch.set_grad_enabled(input.tracked and torch.is_grad_enabled()):
        logprob_M, _ = linear_logprobs(states_ND[counts_N], head.weight_VD, target_N[counts_N], backend=head.backend)
    if logprob_M.requires_grad:
        logprob_M.register_hook(head.run_hooks)
    if reduction == "none":
        loss_N = torch.zeros_like(target_N, dtype=logprob_M.dtype).masked_scatter(counts_N, -logprob_M)
        return loss_N.view(target.shape).to(dtype)
    return -(logprob_M.mean() if reduction == "mean" else logprob_M.sum()).to(dtype)


def _is_distributed(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")


def _leaves_a_mark(func: Any) -> bool:
    """Whether it changes a tensor instead of making another."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")  # `x *= 2` is mul_
    return in_place or name in ("__setitem__", "__set__", "register_hook", "retain_grad")


_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes requires_grad grad grad_fn is_leaf retains_grad output_nr _base "
    "_version is_cpu is_cuda is_meta is_mps is_xpu is_mkldnn is_nested is_quantized is_sparse is_sparse_csr"
)
_METHODS = (
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex "
    "is_signed is_inference is_conj is_neg get_device __len__ __hash__"
)
METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()}
METADATA |= {getattr(Tensor, name) for name in _METHODS.split()}
METADATA |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference, torch.is_conj, torch.is_neg}
LAZY: dict[Any, Callable[..., Any]] = {
    **{func: _arranged(func) for func in (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)},
    Tensor.__getitem__: _item,
    Tensor.contiguous: _contiguous,
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.argmax: _argmax,
    torch.argmax: _argmax,
    Tensor.detach: _detach,
    torch.detach: _detach,
    F.cross_entropy: _cross_entropy,
}
