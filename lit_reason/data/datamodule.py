"""LightningDataModules for the two supervised stages; reinforcement learning has its own iterable, the rollout loop."""

from __future__ import annotations

from functools import partial

from lightning import LightningDataModule

from lit_reason.data.corpus import documents, pack
from lit_reason.data.loader import CursorLoader, pair_batch, text_batch
from lit_reason.data.priming import Pair, priming
from lit_reason.data.prompts import PromptData
from lit_reason.errors import DataError
from lit_reason.types import TokenBatch


class TextData(LightningDataModule):
    """Packed plain text of worked problems and number facts, for pretraining.

    Args:
        data: the same `PromptData` that priming, RL and evaluation use; its held-out questions never enter the text.
        seq_len: tokens per row.
        batch_size: rows per batch and process.
        seed: of the text's order and facts, and of the epochs' orders.
        style: `"steps"` or `"columns"`.
        facts_fraction: share of documents that are number facts.
        max_digits: of the numbers in facts.
        bare_fraction: share of problems put as the bare expression, without the question's words.

    YAML::

        _target_: lit_reason.data.TextData
        data: ${data}
        seq_len: 256
        batch_size: 32
    """

    def __init__(
        self,
        data: PromptData,
        seq_len: int = 256,
        batch_size: int = 32,
        seed: int = 0,
        style: str = "steps",
        facts_fraction: float = 0.2,
        max_digits: int = 2,
        bare_fraction: float = 0.5,
    ) -> None:
        super().__init__()
        self.bare_fraction = bare_fraction
        self.data, self.seq_len, self.batch_size, self.seed = data, seq_len, batch_size, seed
        self.style, self.facts_fraction, self.max_digits = style, facts_fraction, max_digits

    def train_dataloader(self) -> CursorLoader:
        texts = documents(
            self.data.train_prompts(),
            self.data.held_out_fraction,
            self.style,
            self.facts_fraction,
            self.max_digits,
            self.bare_fraction,
            self.seed,
        )
        rows_NT = pack(texts, self.data.tokenizer, self.seq_len)
        return CursorLoader(len(rows_NT), partial(text_batch, rows_NT), self.batch_size, self.seed, True, *_ranks(self))


class SFTData(LightningDataModule):
    """Worked solutions in the chat template, loss on the completion only.

    Args:
        data: the source and its split; solutions come from the solvers or the source's own thoughts.
        n_examples: how many training problems to use (spread over the source); None takes all.
        seq_len: longest prompt + completion in tokens; a longer pair is an error.
        batch_size: pairs per batch and process.
        seed: of the epochs' orders.
        style: `"steps"` or `"columns"`.
        terse_fraction, terse_min_lines: share of problems primed with an empty thought, and which (`priming`).
        val_examples: held-out problems for a validation loss; 0 has none.

    YAML::

        _target_: lit_reason.data.SFTData
        data: ${data}
        n_examples: 500
        batch_size: 32
    """

    def __init__(
        self,
        data: PromptData,
        n_examples: int | None = None,
        seq_len: int = 512,
        batch_size: int = 32,
        seed: int = 0,
        style: str = "steps",
        terse_fraction: float = 0.0,
        terse_min_lines: int = 1,
        val_examples: int = 0,
    ) -> None:
        super().__init__()
        self.data, self.n_examples, self.seq_len = data, n_examples, seq_len
        self.batch_size, self.seed, self.style, self.val_examples = batch_size, seed, style, val_examples
        self.terse_fraction, self.terse_min_lines = terse_fraction, terse_min_lines

    def train_dataloader(self) -> CursorLoader:
        pairs = self._pairs(self.data.train_prompts(self.n_examples))
        return CursorLoader(len(pairs), self._collate(pairs), self.batch_size, self.seed, True, *_ranks(self))

    def val_dataloader(self) -> list[TokenBatch]:
        if self.val_examples == 0:
            return []
        pairs = self._pairs(self.data.test_prompts(self.val_examples))
        collate = self._collate(pairs)
        return [
            collate(range(start, min(start + self.batch_size, len(pairs))))
            for start in range(0, len(pairs), self.batch_size)
        ]

    def _pairs(self, prompts) -> list[Pair]:
        terse = self.terse_fraction, self.terse_min_lines
        pairs = priming(prompts, self.data.tokenizer, self.data.chat, self.style, *terse)
        for prompt, (head, tail) in zip(prompts, pairs, strict=True):
            if (length := len(head) + len(tail)) > self.seq_len:
                raise DataError(
                    f"the worked solution of {prompt.id} ({prompt.question[:60]!r}) has {length} tokens in all, "
                    f"more than seq_len={self.seq_len}; set seq_len={length} or leave such problems out"
                )
        return pairs

    def _collate(self, pairs: list[Pair]):
        return lambda items: pair_batch([pairs[i] for i in items], self.data.tokenizer.pad_id)


def _ranks(module: LightningDataModule) -> tuple[int, int]:
    """(rank, world size) of the attached trainer; a module without one is alone."""
    trainer = module.trainer
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
