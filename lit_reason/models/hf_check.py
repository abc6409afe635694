"""Whether a model of transformers can be a policy: what its config says, and what five tokens show.

Shapes: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_reason.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_reason.models.hf_policy import HFModel

LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length")


def attention_kinds(lm: PreTrainedModel) -> tuple[tuple[str, ...], int | None]:
    """The kinds of the model's attention layers, and the sliding window in tokens, if any.

    Raises:
        ConfigError: a model with other layers, whose state the engine could not take rows from.
    """
    from lit_reason.models.hf_cache import FULL, SLIDING

    config, name = lm.config, type(lm).__name__
    if config.get_text_config() is not config:
        raise ConfigError(
            f"{name} reads more than text. Save its language model as a folder of its own, and type model.name=PATH"
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL]
    others = set(kinds) - {FULL, SLIDING}
    others |= {key for key in ("attention_chunk_size", "attention_types") if getattr(config, key, None)}
    if getattr(lm, "_is_stateful", False) or others:
        raise ConfigError(
            f"{name} has layers that keep another state than keys and values of every position "
            f"({', '.join(sorted(others)) or 'recurrent'}); valid: {FULL}, {SLIDING}. Take another model.name"
        )
    return tuple(sorted(set(kinds))), window if SLIDING in kinds else None


def context(config: Any) -> int:
    """Tokens that a model takes, whatever its config calls them.

    Trap: "longrope" switches its frequencies by the longest row of a batch, so the context ends where it would.
    """
    found = [value for name in LENGTHS if isinstance(value := getattr(config, name, None), int)]
    if not found:
        raise ConfigError(f"{type(config).__name__} does not say how long a sequence may be: none of {LENGTHS}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        found[0] = min(found[0], rope.get("original_max_position_embeddings") or found[0])
    return found[0]


@torch.no_grad()
def check_against(model: HFModel, lm: PreTrainedModel) -> None:
    """Raises ConfigError unless trunk, head, padding and cache give the logits that `lm` gives without any of them."""
    ids_T = (torch.arange(5, device=model.device) * 7 + 3) % model.config.vocab_size
    training = lm.training
    lm.eval()
    try:
        wrong = "its head" if not _same_head(model, lm, ids_T) else None
        length_B = torch.tensor([2, 4], device=model.device)
        padded_BT = torch.where(torch.arange(4, device=model.device) < length_B[:, None], ids_T[:4], ids_T[0])
        cache = model.new_cache(2, 4)
        ours = model.prefill(padded_BT, length_B, cache), model.decode(ids_T[length_B], length_B, cache)
        theirs_TV = lm(input_ids=ids_T[None], use_cache=False).logits[0]
        tolerance = 1e-3 if theirs_TV.dtype.itemsize >= 4 else 0.25  # in bfloat16 another expert may be chosen
        for got_BV, want_BV in zip(ours, (theirs_TV[length_B - 1], theirs_TV[length_B]), strict=True):
            if not (got_BV - want_BV).abs().max() <= tolerance * want_BV.abs().max():
                wrong = wrong or "causal attention over right-padded rows and a cache"
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        raise ConfigError(
            f"{type(lm).__name__} cannot be driven as a causal language model ({type(error).__name__}: {error}). "
            "Take another model.name"
        ) from error
    finally:
        lm.train(training)
    if wrong:
        raise ConfigError(
            f"{type(lm).__name__} computes other logits than its trunk and output embeddings give here ({wrong}), so "
            "its log-probs would be wrong. Take another model.name (a causal decoder)"
        )


def _same_head(model: HFModel, lm: PreTrainedModel, ids_T: Tensor) -> bool:
    """Whether `lm` feeds the trunk's states to the output embeddings and does to their logits what `Head` does.

    The embeddings' output is replaced by -40 .. 40, for the logits of small weights would not show a soft cap.
    """
    seen, head = [], model.full_head()
    ramp = torch.linspace(-40, 40, ids_T.numel() * model.config.vocab_size, device=model.device)

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.append(args[0])
        return ramp.to(output.dtype).view_as(output)

    handle = head.output.register_forward_hook(replace)
    try:
        theirs_1TV = lm(input_ids=ids_T[None], use_cache=False).logits
    finally:
        handle.remove()
    states_1TD = model.hidden(ids_T[None]).states_BTD
    if len(seen) != 1 or seen[0].shape != states_1TD.shape:
        return False
    ours_1TV = head.finish(ramp.to(theirs_1TV.dtype).view_as(theirs_1TV))
    close = 0.05 if ours_1TV.dtype.itemsize < 4 else 1e-4
    return torch.allclose(ours_1TV, theirs_1TV, rtol=close, atol=close) and torch.allclose(
        states_1TD, seen[0], rtol=close, atol=close
    )
