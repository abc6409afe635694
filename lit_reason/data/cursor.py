"""Where we are in a dataset, as integers: a shuffled order is a function of (size, seed, epoch), never a saved list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lit_reason.data.curriculum import Curriculum
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

    With a curriculum an epoch is one walk along that order which passes over what is too difficult yet and does not go
    back for it: no prompt comes twice in an epoch, and each draw is uniform among what the walk has before it and the
    round allows. So the first epochs are shorter, and the state stays a few integers.

    Args:
        prompts: at least one.
        seed: of the order; the state's seed replaces it on `load_state_dict`.
        shuffle: False deals them in the given order.
        curriculum: which prompts may be dealt how soon; None: all, at once.
        prompts_per_round: prompts that make a curriculum's round; needed with one.

    Example::

        >>> cursor = PromptCursor(prompts, seed=1)
        >>> cursor.next(8)  # 8 prompts; across the end of an epoch if need be
        >>> cursor.state_dict()
        {'epoch': 0, 'index': 8, 'seed': 1, 'size': 100}
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int = 0,
        shuffle: bool = True,
        curriculum: Curriculum | None = None,
        prompts_per_round: int | None = None,
    ) -> None:
        if not prompts:
            raise DataError("no prompts to deal: the dataset is empty after its split and filters")
        if curriculum is not None and (prompts_per_round is None or prompts_per_round < 1):
            raise ConfigError(f"got a curriculum and prompts_per_round={prompts_per_round}; valid: 1 or more")
        self.prompts = prompts
        self.shuffle = shuffle
        self.curriculum, self.prompts_per_round = curriculum, prompts_per_round or 1
        self.epoch, self.index, self.seed, self.dealt = 0, 0, seed, 0
        self._order = epoch_order(len(prompts), seed, 0, shuffle)
        self._ranks = None if curriculum is None else curriculum.ranks(prompts)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.index >= len(self.prompts):
                self.epoch, self.index = self.epoch + 1, 0
                self._order = epoch_order(len(self.prompts), self.seed, self.epoch, self.shuffle)
            chunk = self._walk(n - len(taken))
            taken.extend(self.prompts[int(i)] for i in chunk)
            self.dealt += len(chunk)
        return taken

    def _walk(self, n: int) -> np.ndarray:
        """Up to `n` items of this epoch and of one round of the curriculum; `index` moves behind the last."""
        ahead = self._order[self.index :]
        if self.curriculum is None or self._ranks is None:
            self.index += len(ahead[:n])
            return ahead[:n]
        round, within = divmod(self.dealt, self.prompts_per_round)
        allowed = self._ranks[ahead] < self.curriculum.pool(len(self.prompts), round)
        at = np.flatnonzero(allowed)[: min(n, self.prompts_per_round - within)]
        self.index += int(at[-1]) + 1 if len(at) else len(ahead)
        return ahead[at]

    def state_dict(self) -> dict[str, int]:
        state = {"epoch": self.epoch, "index": self.index, "seed": self.seed, "size": len(self.prompts)}
        return state if self.curriculum is None else state | {"dealt": self.dealt}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        check_size(state, len(self.prompts), "prompts")
        if ("dealt" in state) != (self.curriculum is not None):
            saved, now = ("with", "without") if "dealt" in state else ("without", "with")
            raise DataError(
                f"the saved position was reached {saved} a curriculum, and this run is {now} one. "
                "Give the run its old data.curriculum, or start a new run (resume=never)."
            )
        self.epoch, self.index, self.seed = int(state["epoch"]), int(state["index"]), int(state["seed"])
        self.dealt = int(state.get("dealt", 0))
        self._order = epoch_order(len(self.prompts), self.seed, self.epoch, self.shuffle)
