"""Which matrices of a model can have an adapter, and what a target may call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from lit_reason.errors import ConfigError, nearest

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # what models of others call theirs
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Matrix(NamedTuple):
    """A parameter of two dimensions or more.

    Args:
        parameters: number of its entries.
        stacked: experts in one parameter (E, out, in).
        reason: why it can have no adapter; empty if it can.
    """

    parameters: int
    stacked: bool
    reason: str

    def cannot(self, dora: bool, dropout: bool) -> str:
        """Why it can have no adapter of this kind; empty if it can."""
        if self.stacked and not self.reason and (dora or dropout):
            return f"peft has no {'DoRA' if dora else 'dropout'} for stacked experts"
        return self.reason


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every parameter of two dimensions or more, by name."""
    output = getattr(model, "get_output_embeddings", lambda: getattr(model, "head", None))()
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            stacked, reason = parameter.dim() == 3 and not isinstance(module, _CONVOLUTIONS), ""
            if module is output:
                reason = "the head"
            elif isinstance(module, nn.Embedding):
                reason = "an embedding"
            elif prefix.rpartition(".")[2] in _ROUTERS:
                reason = "a router"
            elif not (stacked or (isinstance(module, nn.Linear) and name == "weight")):
                reason = f"adapters do not know {type(module).__name__}"
            found[f"{prefix}.{name}" if prefix else name] = Matrix(parameter.numel(), stacked, reason)
    return found


def choose(found: dict[str, Matrix], targets: Sequence[str] | None, *, dora: bool, dropout: bool) -> list[str]:
    """Names of the parameters to adapt, sorted: what `targets` names, or all that can be.

    Raises:
        ConfigError: when nothing can be adapted, or a target is unknown or cannot be adapted so.
    """
    if targets is None:
        chosen = {name for name, matrix in found.items() if not matrix.cannot(dora, dropout)}
        if not chosen:
            raise ConfigError("the model has no linear map to adapt: torch.nn.Linear, or stacked experts (E, out, in)")
        return sorted(chosen)
    known = {name: spellings(name, matrix.stacked) for name, matrix in found.items() if not matrix.reason}
    chosen = set()
    for target in targets:
        named = {name for name, spelled in known.items() if target in spelled}
        if not named:
            hint = nearest(target, {spelled[0] for spelled in known.values()})
            raise ConfigError(f"adapter.targets: nothing that can be adapted is called {target!r}; {hint}")
        for why in {found[name].cannot(dora, dropout) for name in named} - {""}:
            raise ConfigError(
                f"adapter.targets names {target!r}, but {why}: leave it out, or type adapter.dora=false "
                "adapter.dropout=0"
            )
        chosen |= named
    return sorted(chosen)


def spellings(name: str, stacked: bool) -> list[str]:
    """A parameter's name from its last part to the whole, the shortest first. A place in a list is no name of its own:
    "q.0" is "q" too.

    Example::

        >>> spellings("attn.q.2.weight", stacked=False)
        ['q', 'attn.q', 'q.2', 'attn.q.2']
        >>> spellings("ffn.experts.down", stacked=True)
        ['experts.down', 'ffn.experts.down']
    """
    whole = (name if stacked else name.removesuffix(".weight")).split(".")
    short = whole[:-1] if whole[-1].isdigit() and len(whole) > 1 else whole
    ends = [".".join(parts[-n:]) for parts in (short, whole) for n in range(1 + stacked, len(parts) + 1)]
    return [end for end in dict.fromkeys(ends) if not end.isdigit()] or ends
