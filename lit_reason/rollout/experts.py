"""Which experts the engine chose, for router replay: what every router said while prompts and tokens were read.

Shapes: R requests, B rows of the batch, P distinct prompts, T tokens, L MoE layers, K experts chosen per token."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lit_reason.models import Transformer
from lit_reason.models.moe import MoE


class ExpertLog:
    """Listens to the trunk's routers while it is entered.

    Args:
        requests, longest: R, and the most tokens that a request may get.
    """

    def __init__(self, model: Transformer, requests: int, longest: int) -> None:
        self.routers = [block.ffn.router for block in model.blocks if isinstance(block.ffn, MoE)]
        L, K = len(self.routers), model.config.experts_per_token
        self.prompts: list[Tensor] = []
        self.tokens_RTLK = torch.empty(requests, longest, L, K, dtype=torch.int16, device=model.device)
        self.heard: list[Tensor] = []
        self.handles: list[Any] = []

    def __enter__(self) -> ExpertLog:
        def hear(module: Any, inputs: Any, routing: Any) -> None:
            self.heard.append(routing.experts_NK)

        self.handles = [router.register_forward_hook(hear) for router in self.routers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def _take(self) -> Tensor:
        """experts_NLK of the forward that just ended."""
        heard, self.heard = self.heard, []
        return torch.stack(heard, dim=1).to(torch.int16)

    def read_prompts(self, prompt_B: Tensor, length_B: Tensor) -> None:
        """New requests, in order: what was read are their distinct prompts, right-padded."""
        experts_PTLK = self._take().unflatten(0, (int(prompt_B.max()) + 1, -1))
        pairs = zip(prompt_B.tolist(), length_B.tolist(), strict=True)
        self.prompts += [experts_PTLK[p, :length] for p, length in pairs]

    def read_tokens(self, request_B: Tensor, token_B: Tensor) -> None:
        """What was read is the `token_B`-th token (0, 1, ...) of each of these requests."""
        self.tokens_RTLK[request_B, token_B] = self._take()

    def of_requests(self, counts: Sequence[int]) -> list[Tensor]:
        """experts_SLK of each request that got `counts` tokens; nobody has read the last of them."""
        tokens = self.tokens_RTLK.cpu()
        return [torch.cat((self.prompts[r].cpu(), tokens[r, : n - 1])) for r, n in enumerate(counts)]
