"""The engine protocol over a process: restarts, refusals, sleep. The hosts are small; the processes are real."""

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from lit_reason.errors import ConfigError, EngineDiedError, RolloutError, WeightSyncError
from lit_reason.models.export import checkpoint_tensors
from lit_reason.rollout import Sampling
from lit_reason.rollout.engine import Engine
from lit_reason.rollout.hosted import HostedEngine

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, HERE)
    yield
    sys.path.remove(HERE)


class Small(HostedEngine):
    HOST = "hosts:Remembering"
    marker, always, broken = "", False, False

    def settings(self, model):
        return {"marker": self.marker, "always": self.always}

    def prefix_block(self):
        return 0

    def truth(self, model):
        for i, item in enumerate(checkpoint_tensors(model, self.dtype)):
            if self.broken and i == 2:
                raise ConfigError("this model cannot be exported")
            yield item


@pytest.fixture
def make(tokenizer):
    made = []

    def one(host="Remembering", **attributes):
        engine = type("One", (Small,), {"HOST": f"hosts:{host}", **attributes})(tokenizer, "float32")
        made.append(engine)
        return engine

    yield one
    for engine in made:
        engine.close()


def test_completions_are_records_and_nothing_comes_before_a_push(make, model, prompts, tokenizer):
    engine, three = make(), prompts(3)
    assert isinstance(engine, Engine) and engine.version() == -1
    with pytest.raises(RolloutError, match=r"no weights yet: call engine\.push"):
        engine.generate(three, Sampling(), [1, 2, 3])
    engine.push(model, 4)
    assert engine.version() == 4
    found = engine.generate(three, Sampling(), [65, 66, 67], [0, 1, 2])
    assert [c.prompt_id for c in found] == [p.id for p in three] and [c.sample_idx for c in found] == [0, 1, 2]
    assert [(c.seed, c.version, c.finish_reason) for c in found] == [
        (65, 4, "length"),
        (66, 4, "stop"),
        (67, 4, "length"),
    ]
    assert found[0].token_ids == (65, 4, *three[0].token_ids)
    assert found[0].text == tokenizer.decode(list(found[0].token_ids))
    assert found[1].text == tokenizer.decode(list(found[1].token_ids[:-1]))  # without the stop token
    with pytest.raises(RolloutError, match="got 3 prompts and 2 seeds"):
        engine.generate(three, Sampling(), [1, 2])
    pid = engine.process.pid
    engine.push(model, 5)
    assert engine.process.pid == pid and engine.generate(three, Sampling(), [1, 2, 3])[0].version == 5
    engine.sleep(1)
    with pytest.raises(RolloutError, match=r"sleeps \(level 1\): call engine\.wake"):
        engine.generate(three, Sampling(), [1, 2, 3])
    engine.wake()
    assert engine.generate(three, Sampling(), [1, 2, 3])[0].version == 5
    engine.sleep(2)
    engine.wake()
    assert engine.version() == -1
    with pytest.raises(RolloutError, match=r"weights were dropped by its sleep: call engine\.push"):
        engine.generate(three, Sampling(), [1, 2, 3])
    engine.push(model, 6)
    engine.sleep(2)
    engine.push(model, 7)  # wakes it
    assert engine.process.call("called", silence_s=30) == ["sleep 1", "wake", "sleep 2", "wake", "sleep 2", "wake"]
    assert engine.generate(three, Sampling(), [1, 2, 3])[0].version == 7
    with pytest.raises(RolloutError, match=r"sleep\(level=3\); valid: 1 keeps the weights, 2 drops"):
        engine.sleep(3)
    os.kill(engine.process.pid, signal.SIGKILL)
    engine.process._process.wait()
    engine.push(model, 8)  # a dead one is started anew
    assert engine.process.pid != pid and engine.version() == 8


def test_it_is_restarted_once_and_the_same_seeds_come(make, model, prompts, tmp_path, caplog):
    engine, recovered = make(marker=str(tmp_path / "died")), []
    engine.recovered = lambda again, model, version: recovered.append((again, version))
    engine.push(model, 2)
    pid = engine.process.pid
    with caplog.at_level(logging.WARNING):
        found = engine.generate(prompts(2), Sampling(), [6, 7])
    assert engine.process.pid != pid and recovered == [(engine, 2)]
    assert [c.token_ids[:2] for c in found] == [(6, 2), (7, 2)]
    assert "killed by signal 9" in caplog.text and "the same seeds are generated again" in caplog.text


def test_dying_again_is_an_error(make, model, prompts, tmp_path):
    engine = make(marker=str(tmp_path / "died"), always=True)
    engine.push(model, 2)
    with pytest.raises(EngineDiedError, match="killed by signal 9"):
        engine.generate(prompts(2), Sampling(), [6, 7])


def test_a_policy_that_moved_on_cannot_be_generated_from_again(make, model, prompts, tmp_path):
    engine = make(marker=str(tmp_path / "died"))
    engine.push(model, 2)
    with torch.no_grad():
        model.routers()[0].bias_E[1] += 1e-6
    with pytest.raises(RolloutError, match="moved on since its version 2") as caught:
        engine.generate(prompts(2), Sampling(), [6, 7])
    assert isinstance(caught.value.__cause__, EngineDiedError)


@pytest.mark.parametrize("host", ["Refusing", "Remembering"])
def test_after_a_push_that_broke_off_nothing_is_generated(make, model, prompts, host):
    """Refused by the host, or broken off by the trainer: the engine may hold half of the weights."""
    engine = make(host)
    engine.push(model, 0)
    pid, engine.broken = engine.process.pid, host == "Remembering"
    if engine.broken:
        with pytest.raises(ConfigError, match="cannot be exported"):
            engine.push(model, 1)
    else:
        with pytest.raises(WeightSyncError, match=r"refused the weights of version 1: .*MemoryError: no room"):
            engine.push(model, 1)
    assert engine.version() == -1 and not Path(f"/proc/{pid}").exists()
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(prompts(1), Sampling(), [1])
    engine.broken = False
    engine.push(model, 2)
    assert engine.version() == 2


def test_a_version_that_was_never_pushed_is_refused(make, model, prompts):
    engine = make("Mislabelling")
    engine.push(model, 3)
    with pytest.raises(RolloutError, match=r"of version 2; it had been given 3"):
        engine.generate(prompts(1), Sampling(), [1])
    engine.push(model, 4)
    with pytest.raises(RolloutError, match=r"of version 3; it had been given 4"):  # an older one, too
        engine.generate(prompts(1), Sampling(), [1])


def test_threads_may_ask_at_the_same_time(make, model, prompts):
    engine = make()
    engine.push(model, 0)
    found, two = {}, prompts(2)

    def ask(i):
        found[i] = [c.token_ids[0] for c in engine.generate(two, Sampling(), [i, i + 1])]

    threads = [threading.Thread(target=ask, args=(10 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for version in range(1, 6):
        engine.push(model, version)
    for thread in threads:
        thread.join(timeout=60)
    assert found == {10 * i: [10 * i, 10 * i + 1] for i in range(8)}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "float8"}, "dtype='float8': valid bfloat16, float32, float16"),
        ({"deadlines": {"strat": 1}}, "deadlines: did you mean 'start'. valid: generate, push, start"),
        ({"deadlines": {"push": 0}}, r"deadlines\.push=0: seconds, above 0"),
    ],
)
def test_settings_are_checked(tokenizer, settings, says):
    with pytest.raises(ConfigError, match=says):
        Small(tokenizer, **settings)


def test_a_prompt_without_room_for_an_answer_is_refused(make, make_model, prompts):
    engine = make()
    engine.push(make_model(max_seq_len=7), 0)
    with pytest.raises(RolloutError, match=r"has 14 tokens; valid 1\.\.6"):
        engine.generate(prompts(2), Sampling(), [1, 2])
