"""Rounds made ahead, on stub stages: which weights make them, what overlaps, what fails, what is saved.

Nothing here depends on time: a `Gate` decides when a generation may end.
"""

import io
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_reason.errors import CheckpointError, ConfigError, RolloutError
from lit_reason.loop import RoundShape, Stages, metrics

SHAPE = {"rounds": 5, "prompts_per_round": 4, "group_size": 3, "minibatches": 2, "micro_batches": 3}
BATCHES = 6
LIMIT = 20  # seconds after which a wait is a failure


class Gate:
    """The n-th generation waits until n have been let through."""

    def __init__(self, permits: int = 10**6):
        self.begun = self.ended = 0
        self.permits, self.change = permits, threading.Condition()

    def __enter__(self):
        with self.change:
            self.begun += 1
            mine = self.begun
            self.change.notify_all()
            assert self.change.wait_for(lambda: self.permits >= mine, LIMIT)
        return mine - 1

    def __exit__(self, *error):
        with self.change:
            self.ended += 1

    def allow(self, permits: int) -> None:
        with self.change:
            self.permits = permits
            self.change.notify_all()

    def wait_begun(self, count: int) -> bool:
        with self.change:
            return self.change.wait_for(lambda: self.begun >= count, LIMIT)


class Rounds:
    """Stages whose n-th generation is that of round n, by the version last pushed."""

    def __init__(self, stub, gate: Gate, wrong=frozenset(), fails: int | None = None):
        self.stub, self.gate, self.fails = stub(wrong=wrong), gate, fails
        self.version, self.pushed, self.held, self.threads = -1, [], [], set()

    def push(self, version):
        assert self.gate.begun == self.gate.ended, "the engine is generating"
        self.version = version
        self.pushed.append(version)

    def freeze(self, version):
        def push():
            self.push(version)
            if threading.current_thread() is not threading.main_thread():
                self.held.append(version)

        return push

    def generate(self, prompts, seeds, samples):
        self.threads.add(threading.current_thread())
        with self.gate as number:
            if number == self.fails:
                self.fails = None
                raise OSError("the engine is gone")
            return [replace(c, version=self.version) for c in self.stub.generate(prompts, seeds, samples)]

    def stages(self, freeze: bool = True) -> Stages:
        return replace(
            self.stub.stages(old=True), push=self.push, generate=self.generate, freeze=self.freeze if freeze else None
        )


def versions(seen) -> list[set[int]]:
    return [{c.version for g in r.groups for c in g.completions} for r in seen]


def state_of(loop) -> dict:
    file = io.BytesIO()
    torch.save(loop.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        for name in x.__dataclass_fields__:
            one, other = getattr(x, name), getattr(y, name)
            assert (one is None and other is None) or torch.equal(one, other), name


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_round_r_is_made_by_the_weights_of_round_r_minus_staleness(stub, make_loop, staleness, freeze):
    rounds, seen = Rounds(stub, Gate()), []
    list(make_loop(rounds.stages(freeze), on_round=seen.append, staleness=staleness, **SHAPE))
    assert versions(seen) == [{max(0, r - staleness)} for r in range(5)]
    assert [r.metrics["rollout/age/mean"] for r in seen] == [min(r, staleness) for r in range(5)]
    assert [r.metrics["rollout/age/max"] for r in seen] == [min(r, staleness) for r in range(5)]
    assert rounds.gate.begun == 5
    assert (threading.main_thread() in rounds.threads) == (staleness == 0)


def test_generation_that_lags_behind_training_gets_a_copy_of_its_weights(stub, make_loop):
    """Each round is let through when it is asked for: with staleness 2 the next is then under way at every push."""
    gate, seen = Gate(permits=1), []
    rounds = Rounds(stub, gate)
    loop = make_loop(rounds.stages(), on_round=seen.append, staleness=2, **SHAPE)
    for r in range(5):
        gate.allow(r + 1)
        for _ in range(BATCHES):
            next(loop)
    assert versions(seen) == [{0}, {0}, {0}, {1}, {2}]
    assert rounds.held == [1, 2], "the first found no engine busy; for 3 no round is left, and 4 finds it idle"
    assert rounds.pushed == [0, 1, 2, 4]


def test_without_a_copy_new_weights_wait_until_the_engine_is_idle(stub, make_loop):
    """Round 2 is under way when round 1 is to be trained: its weights go out after that, and before they change."""
    gate = Gate(permits=2)
    rounds = Rounds(stub, gate)
    loop = make_loop(rounds.stages(freeze=False), staleness=2, **SHAPE)
    for _ in range(BATCHES):
        next(loop)
    assert gate.wait_begun(3) and gate.ended == 2
    threading.Timer(0.2, gate.allow, [3]).start()
    next(loop)
    assert gate.ended == 3 and rounds.pushed == [0, 1] and rounds.held == []


@pytest.mark.parametrize("staleness", [1, 2])
def test_the_next_round_is_generated_while_this_one_is_trained(stub, make_loop, staleness):
    gate = Gate(permits=1)
    loop = make_loop(Rounds(stub, gate).stages(), staleness=staleness, **SHAPE)
    for r in range(5):
        for _ in range(BATCHES):  # all of them, while the next generation has begun and may not end
            next(loop)
            if r < 4:
                assert gate.wait_begun(r + 2)
        assert gate.ended == r + 1
        gate.allow(r + 2)


def test_without_staleness_nothing_is_begun_early(stub, make_loop):
    gate = Gate()
    loop = make_loop(Rounds(stub, gate).stages(), **SHAPE)
    for r in range(5):
        for _ in range(BATCHES):
            next(loop)
            assert gate.begun == r + 1


def test_timing_changes_nothing(stub, make_loop):
    """Generation far ahead of training, and always behind it."""
    quick = make_loop(Rounds(stub, Gate()).stages(), staleness=2, **SHAPE)
    fast = []
    for batch in quick:
        quick._ahead.wait()
        fast.append(batch)
    gate = Gate(permits=1)
    loop, late = make_loop(Rounds(stub, gate).stages(), staleness=2, **SHAPE), []
    for r in range(5):
        gate.allow(r + 1)
        late += [next(loop) for _ in range(BATCHES)]
    assert_same(fast, late)
    assert_same(fast, list(make_loop(Rounds(stub, Gate()).stages(), **SHAPE)))  # the stub's tokens know no weights


def test_an_error_of_the_thread_is_raised_by_the_next_batch_with_its_traceback(stub, make_loop):
    rounds = Rounds(stub, Gate(), fails=1)
    loop = make_loop(rounds.stages(), staleness=3, **SHAPE)
    first = [next(loop)]
    loop._ahead.wait()
    with pytest.raises(OSError, match="the engine is gone") as caught:
        next(loop)  # though five batches of round 0 are left
    assert any(frame.name == "generate" for frame in traceback.extract_tb(caught.value.__traceback__))
    assert rounds.gate.begun == 2, "the rounds behind it are not begun"
    # whoever goes on loses nothing
    assert_same(first + list(loop), list(make_loop(Rounds(stub, Gate()).stages(), **SHAPE)))


def test_an_error_in_the_awaited_round_is_raised_at_once(stub, make_loop):
    loop = make_loop(Rounds(stub, Gate(), fails=0).stages(), staleness=2, **SHAPE)
    with pytest.raises(OSError, match="the engine is gone"):
        next(loop)
    assert state_of(loop)["round"] == 0 and state_of(loop)["prompts"]["index"] == 0


def test_a_state_without_the_failed_round_deals_its_prompts_again(stub, make_loop):
    loop = make_loop(Rounds(stub, Gate(), fails=2).stages(), staleness=2, **SHAPE)
    first = [next(loop)]
    state = state_of(loop)
    assert [rollout["index"] for rollout in state["ahead"]] == [1]
    rounds = Rounds(stub, Gate())
    resumed = make_loop(rounds.stages(), staleness=2, **SHAPE)
    resumed.load_state_dict(state)
    assert_same(first + list(resumed), list(make_loop(Rounds(stub, Gate()).stages(), **SHAPE)))
    assert rounds.gate.begun == 3


def test_a_save_during_which_a_round_fails(stub, make_loop):
    gate = Gate(permits=2)
    loop = make_loop(Rounds(stub, gate, fails=2).stages(), staleness=4, **SHAPE)
    next(loop)
    assert gate.wait_begun(3)
    threading.Timer(0.2, gate.allow, [10]).start()
    assert [rollout["index"] for rollout in state_of(loop)["ahead"]] == [1]
    assert gate.begun == 3


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("staleness", [1, 2])
def test_resumed_from_any_batch_it_is_the_same_run(stub, make_loop, staleness, freeze):
    seen = []
    whole = list(make_loop(Rounds(stub, Gate()).stages(), on_round=seen.append, staleness=staleness, **SHAPE))
    told = [(c, r.index) for r in seen for g in r.groups for c in g.completions]
    for stop in range(0, 5 * BATCHES + 1, 2):
        first, again = [], []
        loop = make_loop(Rounds(stub, Gate()).stages(freeze), on_round=first.append, staleness=staleness, **SHAPE)
        batches = [next(loop) for _ in range(stop)]
        state = state_of(loop)
        assert len(state["ahead"]) == (min(staleness, 4 - (stop - 1) // BATCHES) if stop else 0)
        rounds = Rounds(stub, Gate())
        resumed = make_loop(rounds.stages(freeze), on_round=again.append, staleness=staleness, **SHAPE)
        resumed.load_state_dict(state)
        batches += list(resumed)
        assert_same(whole, batches)
        assert told == [(c, r.index) for r in first + again for g in r.groups for c in g.completions]
        assert versions(again) == versions(seen)[len(first) :]


def test_a_save_waits_for_the_round_that_is_being_generated(stub, make_loop):
    gate = Gate(permits=1)
    loop = make_loop(Rounds(stub, gate).stages(), staleness=1, **SHAPE)
    first = [next(loop)]
    assert gate.wait_begun(2) and gate.ended == 1
    threading.Timer(0.2, gate.allow, [10]).start()
    state = state_of(loop)
    assert gate.ended == 2 and [rollout["index"] for rollout in state["ahead"]] == [1]
    resumed = make_loop(Rounds(stub, Gate()).stages(), staleness=1, **SHAPE)
    resumed.load_state_dict(state)
    assert_same(first + list(resumed), first + list(loop))


def test_a_checkpoint_of_older_rounds_than_the_run_allows_is_refused(stub, make_loop):
    loop = make_loop(Rounds(stub, Gate()).stages(), staleness=2, **SHAPE)
    for _ in range(2 * BATCHES):
        next(loop)
    state = state_of(loop)
    for staleness in (0, 1):
        other = make_loop(Rounds(stub, Gate()).stages(), staleness=staleness, **SHAPE)
        with pytest.raises(CheckpointError, match=r"2 rounds ahead.*type rollout\.shape\.staleness=2"):
            other.load_state_dict(state)
    seen = []
    more = make_loop(Rounds(stub, Gate()).stages(), staleness=3, on_round=seen.append, **SHAPE)
    more.load_state_dict(state)
    list(more)
    assert [r.metrics["rollout/age/max"] for r in seen] == [2, 2, 2]


def test_an_engine_that_keeps_old_weights_is_found_out(stub, make_loop):
    rounds = Rounds(stub, Gate())
    stages = replace(rounds.stages(freeze=False), push=lambda version: rounds.push(0))
    loop = make_loop(stages, staleness=1, **SHAPE)
    with pytest.raises(RolloutError, match=r"round 2 was generated by weights that are 2 rounds old"):
        list(loop)


def test_closed_it_begins_nothing_more_and_may_go_on_later(stub, make_loop):
    gate = Gate(permits=1)
    loop = make_loop(Rounds(stub, gate).stages(), staleness=3, **SHAPE)
    first = [next(loop)]
    assert gate.wait_begun(2)
    threading.Timer(0.2, gate.allow, [10]).start()
    loop.close()
    assert gate.ended == 2, "the engine is free"
    assert [rollout["index"] for rollout in state_of(loop)["ahead"]] == [1] and gate.begun == 2
    assert_same(first + list(loop), list(make_loop(Rounds(stub, Gate()).stages(), **SHAPE)))


def test_an_idle_loop_leaves_no_thread(stub, make_loop):
    rounds = Rounds(stub, Gate())
    loop = make_loop(rounds.stages(), staleness=2, **SHAPE)
    next(loop)
    loop._ahead.wait()
    for thread in rounds.threads:
        thread.join(LIMIT)
        assert thread.daemon and not thread.is_alive()


def test_generation_is_timed_where_it_runs_and_waiting_where_training_waits(stub, make_loop, monkeypatch):
    """Generation takes 3 s on this clock and scoring 1 s, while the first batch of the round before is trained. Each
    batch takes 0.5 s besides, so a round's training 4 + 6 * 0.5 s. Only round 0 is waited for."""
    now, seen, gate = [100.0], [], Gate(permits=1)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    rounds = Rounds(stub, gate)

    def slow(call, seconds):
        def run(*args):
            result = call(*args)
            now[0] += seconds
            return result

        return run

    stages = replace(rounds.stages(), generate=slow(rounds.generate, 3.0), score=slow(rounds.stub.score, 1.0))
    loop = make_loop(stages, on_round=seen.append, staleness=1, **SHAPE)
    for i, _ in enumerate(loop):
        gate.allow(i // BATCHES + 2)
        loop._ahead.wait()
        now[0] += 0.5
    tokens = [r.tokens for r in seen]
    assert [r.metrics["speed/generate_tokens_per_s"] for r in seen] == pytest.approx([n / 3 for n in tokens])
    assert [r.metrics["speed/score_per_s"] for r in seen] == pytest.approx([12.0] * 5)
    assert [r.metrics["speed/wait_s"] for r in seen] == [4.0, 0.0, 0.0, 0.0, 0.0]
    rates = [r.metrics.get("speed/train_tokens_per_s") for r in seen]
    assert rates[0] is None and rates[1:] == pytest.approx([n / 7.0 for n in tokens[:4]])


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ({"staleness": -1}, ["staleness=-1", "0 (off) or more"]),
        ({"in_flight": True}, ["in_flight=true with staleness=0", "Type rollout.shape.staleness=1"]),
    ],
)
def test_shapes_that_are_refused(shape, parts):
    with pytest.raises(ConfigError) as caught:
        RoundShape(**shape)
    assert all(part in str(caught.value) for part in parts)


def test_several_processes_are_refused():
    RoundShape(staleness=1).check_ranks(1)
    with pytest.raises(ConfigError, match=r"staleness=1 on 2 processes.*Type rollout\.shape\.staleness=0"):
        RoundShape(staleness=1).check_ranks(2)


def test_engines_that_cannot_are_refused_before_anything_is_generated(stub, make_loop):
    stages = stub().stages()
    with pytest.raises(ConfigError, match=r"cannot take new weights.*Type rollout\.shape\.in_flight=false"):
        make_loop(stages, staleness=1, in_flight=True, **SHAPE)
    make_loop(replace(stages, in_flight=True), staleness=1, in_flight=True, **SHAPE)


@pytest.mark.parametrize("how", ["error", "ctrl-c"])
def test_a_process_that_ends_does_not_wait_for_a_generation_that_hangs(how):
    """Training raises, or is interrupted while it waits."""
    script = Path(__file__).with_name("hanging_run.py")
    process = subprocess.Popen([sys.executable, script, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "hangs\n"
        if how == "ctrl-c":
            process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert ("KeyboardInterrupt" if how == "ctrl-c" else "training failed") in stderr.splitlines()[-1]
    assert process.returncode == (-signal.SIGINT if how == "ctrl-c" else 1)
