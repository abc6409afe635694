"""The rows that decode together: admitted with their prompts, a token a row and step, dropped when they are done.

`CohortBatch` for our models (`models/cohorts.py`), `CacheBatch` for any other `CausalLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from lit_kernels.sizes import round_up
from torch import Tensor

from lit_reason.models import CausalLM, Transformer
from lit_reason.models.absorbed import Absorbed
from lit_reason.models.block import Block
from lit_reason.models.cohorts import Cohort, Cohorts

Ids = Sequence[tuple[int, ...]]


class Batch(Protocol):
    def admit(self, prompts: Ids) -> tuple[Tensor, Tensor]:
        """New rows, behind those that are there: their logits_BV, and which of the distinct prompts each has."""
        ...

    def drop(self, alive_B: Tensor) -> Tensor | None:
        """May drop rows that are not alive. The rows that stay, as indices; None if all do."""
        ...

    def step(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        """Each row's newest token, and where it stands: logits_BV of the next."""
        ...


def new_batch(model: CausalLM) -> Batch:
    return CohortBatch(model) if isinstance(model, Transformer) else CacheBatch(model)


class CohortBatch:
    """Rows of our model, in cohorts that share their prompts."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.rows = model, Cohorts()
        self.layers = [Absorbed(cast(Block, block).attn) for block in model.blocks]

    def admit(self, prompts: Ids) -> tuple[Tensor, Tensor]:
        cache, logits_PV, length_P, prompt_B = prefill(self.model, prompts)
        self.rows.admit(Cohort(cache.layers, length_P, prompt_B))
        return logits_PV[prompt_B], prompt_B

    def drop(self, alive_B: Tensor) -> Tensor | None:
        return self.rows.drop(alive_B)

    def step(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        self.rows.begin(position_B)
        logits_BV = self.model.head(self.model.decode_states(token_B[:, None], self.rows, self.layers)[:, 0])
        self.rows.end()
        return logits_BV


class CacheBatch:
    """Rows of any model, in one cache."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.cache: Any = None

    def admit(self, prompts: Ids) -> tuple[Tensor, Tensor]:
        cache, logits_PV, _, prompt_B = prefill(self.model, prompts)
        cache.select(prompt_B)
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)
        return logits_PV[prompt_B], prompt_B

    def drop(self, alive_B: Tensor) -> Tensor | None:
        live = int(alive_B.sum())
        if live == 0:
            self.cache = None
            return alive_B.nonzero().squeeze(1)
        if round_up(live) >= len(alive_B):
            return None
        index = (~alive_B).argsort(stable=True)[: round_up(live)]
        self.cache.select(index)
        return index

    def step(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        return self.model.decode(token_B, position_B, self.cache)


def prefill(model: CausalLM, prompts: Ids) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Reads each distinct prompt once.

    Returns:
        The cache and the logits_PV of the P distinct prompts, their lengths, and which of them each row has.
    """
    place = {ids: i for i, ids in enumerate(dict.fromkeys(prompts))}
    length_P = torch.tensor([len(ids) for ids in place], device=model.device)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in place], batch_first=True).to(model.device)
    cache = model.new_cache(len(place), padded.shape[1])
    logits_PV = model.prefill(padded, length_P, cache)
    return cache, logits_PV, length_P, torch.tensor([place[ids] for ids in prompts], device=model.device)
