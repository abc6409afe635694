"""Where we are in a dataset, as integers: a shuffled order is a function of (size, seed, epoch), never a saved list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt


def epoch_order(size: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """int64 (size,): the order in which epoch `epoch` visits `size` items."""
    if seed < 0:
        raise ConfigError(f"got seed={seed}; a seed is an integer >= 0")
    if not shuffle:
        return np.arange(size)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(size)


def check_size(state: Mapping[str, int], size: int, what: str) -> None:
    """A saved position means nothing in a dataset of another size."""
    if state["size"] != size:
        raise DataError(
            f"the saved position belongs to {state['size']} {what}, but there are {size} now. "
            "Give the run its old data settings, or start a new run (resume=never)."
        )


class PromptCursor:
    """Deals prompts without end, each epoch in an order of its own.

    Args:
        prompts: at least one.
        seed: of the order; the state's seed replaces it on `load_state_dict`.
        shuffle: False deals them in the given order.

    Example::

        >>> cursor = PromptCursor(prompts, seed=1)
        >>> cursor.next(8)  # 8 prompts; across the end of an epoch if need be
        >>> cursor.state_dict()
        {'epoch': 0, 'index': 8, 'seed': 1, 'size': 100}
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int = 0, shuffle: bool = True) -> None:
        if not prompts:
            raise DataError("no prompts to deal: the dataset is empty after its split and filters")
        self.prompts = prompts
        self.shuffle = shuffle
        self.epoch, self.index, self.seed = 0, 0, seed
        self._order = epoch_order(len(prompts), seed, 0, shuffle)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.index >= len(self.prompts):
                self.epoch, self.index = self.epoch + 1, 0
                self._order = epoch_order(len(self.prompts), self.seed, self.epoch, self.shuffle)
            chunk = self._order[self.index : self.index + n - len(taken)]
            taken.extend(self.prompts[int(i)] for i in chunk)
            self.index += len(chunk)
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "seed": self.seed, "size": len(self.prompts)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        check_size(state, len(self.prompts), "prompts")
        self.epoch, self.index, self.seed = int(state["epoch"]), int(state["index"]), int(state["seed"])
        self._order = epoch_order(len(self.prompts), self.seed, self.epoch, self.shuffle)
