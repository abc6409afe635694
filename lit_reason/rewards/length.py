"""Is the completion short enough? In tokens, so that no text need be decoded."""

from __future__ import annotations

from lit_reason.errors import ConfigError
from lit_reason.rewards.base import ItemReward
from lit_reason.types import Completion, Prompt


class Length(ItemReward):
    """`inside` up to max_tokens - buffer, then a straight line to `outside` at max_tokens, `outside` beyond.

    With inside=0 and outside=-1 this is DAPO's soft overlong punishment (2503.14476, eq. 13):
    0 for L <= L_max - L_cache, ((L_max - L_cache) - L) / L_cache up to L_max, -1 beyond.

    Trap: where generation stops before max_tokens (`rollout.sampling.max_tokens`), `outside` is never reached.

    Args:
        max_tokens: L_max, the stop token counted, and what an environment wrote into the completion.
        buffer: L_cache, tokens over which the score falls; 0 makes it a step (L <= max_tokens is inside).
        inside: the score of a short completion.
        outside: the score of one that is too long.
        weight: the column's weight.
    """

    def __init__(
        self, max_tokens: int, buffer: int = 0, inside: float = 1.0, outside: float = 0.0, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if max_tokens < 1 or not 0 <= buffer <= max_tokens:
            raise ConfigError(f"got max_tokens={max_tokens}, buffer={buffer}; valid: 0 <= buffer <= max_tokens, >= 1")
        self.max_tokens, self.buffer = max_tokens, buffer
        self.inside, self.outside = inside, outside

    def score(self, prompt: Prompt, completion: Completion) -> float:
        over = len(completion.token_ids) - (self.max_tokens - self.buffer)
        if over <= 0:
            return float(self.inside)
        fallen = min(1.0, over / self.buffer) if self.buffer else 1.0
        return self.inside + (self.outside - self.inside) * fallen
