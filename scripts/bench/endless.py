"""A tokenizer of which no model makes the stop token: completions end at their limits."""

from __future__ import annotations

from collections.abc import Sequence

from lit_reason.data import ByteTokenizer


class Endless(ByteTokenizer):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.stop_ids = (vocab,)

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([i for i in ids if i < ByteTokenizer.vocab_size])
