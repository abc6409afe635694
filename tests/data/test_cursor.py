"""Endless dealing whose whole state is integers."""

import json

import numpy as np
import pytest

from lit_reason.data import PromptCursor
from lit_reason.data.cursor import epoch_order
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt

PROMPTS = [Prompt(f"{i:016x}", str(i), "", "test") for i in range(10)]


def ids(prompts):
    return [int(p.question) for p in prompts]


def test_each_epoch_deals_every_prompt_once_in_its_own_order():
    cursor = PromptCursor(PROMPTS, seed=5)
    dealt = ids(cursor.next(4) + cursor.next(13) + cursor.next(13))
    epochs = [dealt[0:10], dealt[10:20], dealt[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(PromptCursor(PROMPTS, seed=6).next(10)) != epochs[0]
    assert ids(PromptCursor(PROMPTS, shuffle=False).next(12)) == [*range(10), 0, 1]


@pytest.mark.parametrize("position", [0, 3, 10, 14, 20, 27])
def test_resume_deals_what_would_have_come(position):
    whole = PromptCursor(PROMPTS, seed=5)
    whole.next(position)
    state = json.loads(json.dumps(whole.state_dict()))
    assert all(type(value) is int for value in state.values())
    resumed = PromptCursor(PROMPTS, seed=99)
    resumed.load_state_dict(state)
    assert ids(resumed.next(25)) == ids(whole.next(25))
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("key", ["epoch", "index", "seed", "size"])
def test_every_key_of_the_state_is_needed(key):
    cursor = PromptCursor(PROMPTS, seed=5)
    cursor.next(13)
    state = cursor.state_dict()
    del state[key]
    with pytest.raises(KeyError):
        PromptCursor(PROMPTS).load_state_dict(state)


def test_the_order_is_fixed_for_all_time():
    """Checkpoints hold (seed, epoch), so the order they stand for must not change between releases."""
    assert epoch_order(8, seed=1, epoch=0).tolist() == [1, 7, 0, 4, 6, 3, 5, 2]
    assert epoch_order(8, seed=1, epoch=1).tolist() == [5, 0, 3, 1, 7, 4, 2, 6]
    assert np.array_equal(epoch_order(5, 1, 3, shuffle=False), np.arange(5))


def test_refusals():
    with pytest.raises(DataError, match="no prompts to deal"):
        PromptCursor([])
    with pytest.raises(ConfigError, match="seed=-1"):
        PromptCursor(PROMPTS, seed=-1)
    state = PromptCursor(PROMPTS).state_dict()
    with pytest.raises(DataError, match="belongs to 10 prompts, but there are 9 now"):
        PromptCursor(PROMPTS[:9]).load_state_dict(state)
