"""Coordinate check of muP: how far training moves activations, and what the matrices' own updates do.

On one fixed batch, after t optimizer steps (Tensor Programs V, 2203.03466, appendix D; the refined check: 2505.22491):

    change   rms(h_t - h_0)           of a hidden quantity h: all that training did to it, in its layer and below
    update   rms((W_t - W_0) x_t)     of a matrix W that reads x: the effect of its own updates alone

Right rules keep both the same at every width and depth: the slope of log2 rms against log2 size is about 0. The change
of head and router logits shrinks with the width even so (its part W_0 (x_t - x_0) does): judge them by their updates.

Names are `kind/module`, e.g. `q/blocks.1.attn`. For a `Transformer` the kinds are

    change   embedding; q, latent, k, v, attn_logits, attn_out (2405.04434 eq. 9-19; q and k after the rotation);
             ffn_out, residual (the stream after each block); router_logits, head_logits
    update   embedding, W_Q or W_DQ and W_UQ, W_DKV, W_KR, W_UK, W_UV, W_O, ffn_*, shared_*, expert_* (gate, up, down),
             router, head

and for any other `nn.Linear` or `nn.Embedding` the role of its weight (`lit_reason.models.mup`) is the kind of both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_reason.models.layers import SwiGLU, silu_mul
from lit_reason.models.mla import MLA
from lit_reason.models.moe import Experts, MoE, Router
from lit_reason.models.mup import parameter_roles
from lit_reason.models.transformer import Block, Transformer

Record = Callable[[str, Tensor], None]
Pieces = Callable[[Tensor], dict[str, Tensor]]
Moved = Callable[[Tensor], Tensor]  # W -> W_t - W_0


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Root mean squares by `kind/module`, in the units of the quantity itself."""

    change: dict[str, float]
    update: dict[str, float]


class CoordinateProbe:
    """Remembers a model's matrices and activations as they are now, and measures how far both have moved since.

    Nothing of a measurement stays behind: it runs without gradients, in eval mode, with the random state restored.

    Example::

        probe = CoordinateProbe(model, lambda: model(input_ids_BT))
        ...  # train for some steps
        probe.measure().update["W_DQ/blocks.0.attn"]

    Args:
        model: whole parameters, not sharded ones; one more copy of its matrices is kept.
        forward: runs the model on the batch that every measurement uses.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        self.model, self.forward = model, forward
        self._initial = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.dim() > 1}
        self._before: dict[str, Tensor] = {}
        self._run(self._before.__setitem__)

    def measure(self) -> Coordinates:
        """The distance from the start, by the weights as they are now."""
        change: dict[str, float] = {}
        update: dict[str, float] = {}

        def compare(name: str, after: Tensor) -> None:
            change[name] = rms(after - self._before[name])

        self._run(compare, lambda name, value: update.__setitem__(name, rms(value)))
        return Coordinates(change, update)

    def _run(self, activation: Record, update: Record | None = None) -> None:
        handles = list(_watch_activations(self.model, _numbered(activation)))
        if update is not None:
            handles += _watch_updates(self.model, self._initial, _numbered(update))
        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(_without_a_trace(self.model))
            self.forward()


def rms(values: Tensor) -> float:
    return values.float().square().mean().sqrt().item()


def by_kind(values: Mapping[str, float]) -> dict[str, float]:
    """`{"q/blocks.0.attn": 3.0, "q/blocks.1.attn": 1.0}` -> `{"q": sqrt(5)}`: the RMS over modules of a kind."""
    squares: dict[str, list[float]] = {}
    for name, value in values.items():
        squares.setdefault(name.partition("/")[0], []).append(value**2)
    return {kind: math.sqrt(sum(found) / len(found)) for kind, found in squares.items()}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log2(value) against log2(size); NaN where a value is 0 or not finite."""
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan
    x, y = ([math.log2(number) for number in numbers] for numbers in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def _numbered(record: Record) -> Record:
    """Hands values on in float32; the second call of a module is `name#2`."""
    calls: Counter[str] = Counter()

    def numbered(name: str, value: Tensor) -> None:
        calls[name] += 1
        record(name if calls[name] == 1 else f"{name}#{calls[name]}", value.float())

    return numbered


@contextmanager
def _without_a_trace(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no counters; modes and random state as before on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


# Activations


def _watch_activations(model: nn.Module, record: Record) -> Iterator[RemovableHandle]:
    """Hooks that hand every watched quantity to `record`, for a `Transformer` anywhere in `model` and all the rest."""
    ours: set[nn.Module] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Transformer):
            ours |= set(module.modules())
            yield _output(module.embed, f"embedding/{_join(prefix, 'embed')}", record)
            yield _output(module.head, f"head_logits/{_join(prefix, 'head')}", record)
        elif isinstance(module, MLA):
            yield _output(module, f"attn_out/{prefix}", record)
            yield _output(module.kv_norm, f"latent/{prefix}", record)
            yield module.register_forward_pre_hook(_attention_hook(prefix, record))
        elif isinstance(module, Block):
            yield _output(module, f"residual/{prefix}", record)
            yield _output(module.ffn, f"ffn_out/{prefix}", record)
        elif isinstance(module, Router):
            yield module.register_forward_pre_hook(_router_hook(f"router_logits/{prefix}", record))
    for name, module, kind in _plain_matrices(model):
        if module not in ours:
            yield _output(module, f"{kind}/{name}", record)


def _output(module: nn.Module, name: str, record: Record) -> RemovableHandle:
    """Records what a module returns, or the first of several."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        record(name, out[0] if isinstance(out, tuple) else out)

    return module.register_forward_hook(hook)


def _attention_hook(prefix: str, record: Record) -> Callable[..., Any]:
    """Puts a listener in place of the function `attend` that `MLA.forward(x, rotation, attend, ...)` is given."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, rotation, attend, *rest = args

        def listen(q_BTHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor, scale: float) -> Tensor:
            for name, value in (("q", q_BTHd), ("k", k_BTHd), ("v", v_BTHd)):
                record(f"{name}/{prefix}", value)
            record(f"attn_logits/{prefix}", _causal_logits(q_BTHd, k_BTHd, scale))
            return attend(q_BTHd, k_BTHd, v_BTHd, scale)

        return (x, rotation, listen, *rest)

    return hook


def _causal_logits(q_BTHd: Tensor, k_BTHd: Tensor, scale: float) -> Tensor:
    """The logits that a token has for itself and those before it, flattened."""
    logits_BHTT = _product(q_BTHd.transpose(1, 2), k_BTHd.transpose(1, 2)) * scale
    seen_TT = torch.ones(logits_BHTT.shape[-2:], dtype=torch.bool, device=logits_BHTT.device).tril()
    return logits_BHTT[..., seen_TT]


def _router_hook(name: str, record: Record) -> Callable[..., None]:
    return lambda router, args: record(name, _product(args[0], router.weight))


# Effective updates


def _watch_updates(model: nn.Module, initial: Mapping[str, Tensor], record: Record) -> Iterator[RemovableHandle]:
    """Hooks that hand (W - W_0) x of every matrix to `record`."""
    pieces = _pieces_of_ours(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied weight has one name

    def moved(weight: Tensor) -> Tensor:
        return weight.detach().float() - initial[names[id(weight)]]

    for name, module in model.named_modules():
        if isinstance(module, Router):
            yield module.register_forward_pre_hook(_router_update(f"router/{name}", moved, record))
        elif isinstance(module, Experts):
            yield module.register_forward_pre_hook(_expert_updates(name, moved, record))
    for name, module, kind in _plain_matrices(model):
        split = pieces.get(module, _whole(kind))
        yield module.register_forward_pre_hook(_matrix_update(name, split, moved, record))


def _router_update(name: str, moved: Moved, record: Record) -> Callable[..., None]:
    return lambda router, args: record(name, _product(args[0], moved(router.weight)))


def _matrix_update(name: str, split: Pieces, moved: Moved, record: Record) -> Callable[..., None]:
    def hook(module: nn.Linear | nn.Embedding, args: tuple[Tensor, ...]) -> None:
        delta = moved(module.weight)
        out = F.embedding(args[0], delta) if isinstance(module, nn.Embedding) else _product(args[0], delta)
        for kind, part in split(out).items():
            record(f"{kind}/{name}", part)

    return hook


def _expert_updates(name: str, moved: Moved, record: Record) -> Callable[..., None]:
    def hook(experts: Experts, args: tuple[Any, ...]) -> None:
        """Each token by the experts that it chose."""
        x_ND, routing = args
        delta_gate_up, delta_down = moved(experts.gate_up), moved(experts.down)
        gate_up, down = [], []
        for e in routing.experts_NK.unique().tolist():
            x_nD = x_ND[(routing.experts_NK == e).any(-1)]
            gate_up.append(_product(x_nD, delta_gate_up[e]))
            down.append(_product(silu_mul(_product(x_nD, experts.gate_up[e])), delta_down[e]))
        for kind, part in (_gate_up("expert")(torch.cat(gate_up)) | {"expert_down": torch.cat(down)}).items():
            record(f"{kind}/{name}", part)

    return hook


def _pieces_of_ours(model: nn.Module) -> dict[nn.Module, Pieces]:
    """How the outputs of our layers' matrices divide into the published ones (2405.04434)."""
    found: dict[nn.Module, Pieces] = {}
    for module in model.modules():
        if isinstance(module, MLA):
            found |= _pieces_of_attention(module)
        elif isinstance(module, MoE) and module.shared is not None:
            found |= _pieces_of_swiglu(module.shared, "shared")
        elif isinstance(module, Block) and isinstance(module.ffn, SwiGLU):
            found |= _pieces_of_swiglu(module.ffn, "ffn")
    return found


def _pieces_of_attention(attn: MLA) -> dict[nn.Module, Pieces]:
    queries: dict[nn.Module, Pieces] = (
        {attn.q[0]: _whole("W_DQ"), attn.q[2]: _whole("W_UQ")}
        if isinstance(attn.q, nn.Sequential)
        else {attn.q: _whole("W_Q")}
    )

    def down(out: Tensor) -> dict[str, Tensor]:
        latent, key_rope = out.split((attn.latent, attn.rope), dim=-1)
        return {"W_DKV": latent, "W_KR": key_rope}

    def up(out: Tensor) -> dict[str, Tensor]:
        key, value = out.unflatten(-1, (attn.heads, -1)).split((attn.nope, attn.value), dim=-1)
        return {"W_UK": key, "W_UV": value}

    return queries | {attn.kv_a: down, attn.kv_b: up, attn.out: _whole("W_O")}


def _pieces_of_swiglu(ffn: SwiGLU, kind: str) -> dict[nn.Module, Pieces]:
    return {ffn.gate_up: _gate_up(kind), ffn.down: _whole(f"{kind}_down")}


def _whole(kind: str) -> Pieces:
    return lambda out: {kind: out}


def _gate_up(kind: str) -> Pieces:
    return lambda out: dict(zip((f"{kind}_gate", f"{kind}_up"), out.chunk(2, dim=-1), strict=True))


def _plain_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, role of its weight) of every `nn.Linear` and `nn.Embedding`."""
    roles = parameter_roles(model)
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield name, module, roles[owners[id(module.weight)]].kind


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T over the last dimensions, in float32 whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ weight.float().transpose(-1, -2)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
