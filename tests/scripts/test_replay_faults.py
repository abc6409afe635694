"""The judge of the fault replays: what counts as caught. The replays themselves are `scripts/replay_faults.py`."""

import re
from types import SimpleNamespace

import pytest

from lit_reason.errors import RolloutError, WeightSyncError


@pytest.fixture(scope="module")
def replays(load):
    load("replay_faults")
    import faults.replays

    return faults.replays


@pytest.fixture
def healed():
    """A run that counts how often it was mended."""
    run = SimpleNamespace(version=7, healed=0)
    run.heal = lambda: setattr(run, "healed", run.healed + 1)
    return run


def raising(error):
    def act(run):
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "caught", "line"),
    [
        (raising(WeightSyncError("router bias differs\nmore")), True, "WeightSyncError: router bias differs"),
        (raising(WeightSyncError("another thing")), False, "WeightSyncError: another thing"),
        (raising(RolloutError("router bias differs")), False, "RolloutError: router bias differs"),
        (lambda run: None, False, "nothing was noticed"),
    ],
)
def test_only_the_error_that_names_the_fault_counts(replays, healed, act, caught, line):
    fault = replays.Fault("f", "broken", act, r"WeightSyncError: .*router bias", "checksums")
    outcome = fault.replay(healed, "float32")
    assert (outcome.caught, outcome.error, outcome.step, healed.healed) == (caught, line, 7, 1)


def test_an_error_of_python_is_a_bug_and_no_catch(replays, healed):
    with pytest.raises(KeyError):
        replays.Fault("f", "broken", raising(KeyError("x")), "", "").replay(healed, "float32")


def test_a_restart_counts_only_with_all_completions_the_same(replays):
    said = "restarted once, proven, {} of 16 completions the same"
    assert re.search(replays.ALL_THE_SAME, said.format(16))
    assert not re.search(replays.ALL_THE_SAME, said.format(15)) and not re.search(replays.ALL_THE_SAME, "not noticed")


def test_every_fault_of_the_issue_is_replayed(replays):
    names = {fault.name for fault in (*replays.AT_PUSH, *replays.AT_GENERATION, replays.WITH_ADAPTERS)}
    assert names >= {
        "skipped push", "router bias forgotten", "skipped cache flush", "swapped gate/up", "one expert missing",
        "sleep level 2 without reload", "hidden race", "engine killed", "engine stopped", "out of memory",
        "out of memory, killed", "refused transfer", "adapters not delivered", "stale after sleep",
        "router bias in bfloat16",
    }  # fmt: skip
