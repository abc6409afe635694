"""Several engines as one: what they make, what they say they hold, and how they end. The processes are real."""

import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_reason.errors import ConfigError, EngineDiedError, RolloutError, WeightSyncError
from lit_reason.models.export import checkpoint_tensors
from lit_reason.rollout import BuiltinEngine, BuiltinProcess, Provable, Replicas, Sampling
from lit_reason.rollout.engine import Engine, Held, NextToken, Progress
from lit_reason.rollout.hosted import HostedEngine
from lit_reason.rollout.replicas import Together, agreed, cut, in_turn
from lit_reason.sync import Proof, ProvenEngine

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, HERE)
    yield
    sys.path.remove(HERE)


@pytest.fixture
def make(tokenizer):
    """`make("Sleeping", "Remembering", marker=...)`: a replica of each host; the settings are the last one's."""
    made = []

    class Small(HostedEngine):
        said: dict = {}

        def settings(self, model):
            return self.said

        def prefix_block(self):
            return 0

        def truth(self, model):
            return checkpoint_tensors(model, self.dtype)

    def several(*hosts, **said):
        kinds = [type(host, (Small,), {"HOST": f"hosts:{host}"}) for host in hosts]
        kinds[-1].said = said
        made.append(Replicas([kind(tokenizer, "float32") for kind in kinds]))
        return made[-1]

    yield several
    for engine in made:
        engine.close()


@pytest.fixture
def two(tokenizer):
    engine = Replicas([BuiltinProcess(tokenizer, "float32") for _ in range(2)])
    yield engine
    engine.close()


@pytest.mark.parametrize(("count", "parts"), [(0, 2), (1, 3), (7, 3), (512, 2)])
def test_shares_are_even_and_in_order(count, parts):
    shares = [list(range(count))[share] for share in cut(count, parts)]
    assert [i for share in shares for i in share] == list(range(count)) and len(shares) == parts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_completions_are_those_of_one_engine_and_every_push_is_proven(model, prompts, tokenizer, two):
    asked, sampling, limits = prompts(7), Sampling(1.0, max_tokens=16), [3, 16, 1, 9, 16, 16, 2]
    one = BuiltinEngine(tokenizer, "float32")
    proven = ProvenEngine(two, Proof([prompt.token_ids for prompt in prompts(4)]))
    assert isinstance(two, Engine) and isinstance(two, Provable) and not two.in_flight and two.version() == -1
    for version in (0, 1):
        with torch.no_grad():
            model.head.weight[5:9].mul_(-1)
        one.push(model, version)
        proven.push(model, version)
        assert proven.measured["sync/tensors"] == len(model.state_dict()) and two.version() == version
        heard = []
        found = two.generate(asked, sampling, range(7), [3] * 7, heard.append, limits)
        expected = one.generate(asked, sampling, range(7), [3] * 7, limits=limits)
        for ours, its in zip(found, expected, strict=True):
            assert ours.logprobs == pytest.approx(its.logprobs, abs=1e-5)  # other neighbours round otherwise
            assert dataclasses.replace(ours, logprobs=its.logprobs) == its
        tokens = sum(len(completion.token_ids) for completion in found)
        assert (heard[-1].done, heard[-1].total, heard[-1].tokens) == (7, 7, tokens)
    assert len({engine.process.pid for engine in two.engines}) == 2
    assert len(two.generate(asked[:1], sampling, [1])) == 1  # a share without requests


def test_a_replica_that_missed_a_push_is_named(model, prompts, two):
    proven = ProvenEngine(two, Proof([prompt.token_ids for prompt in prompts(4)]))
    proven.push(model, 0)
    deaf = two.engines[1]
    deaf.push = lambda model, version: None  # type: ignore[method-assign]
    with torch.no_grad():
        model.blocks[1].ffn.router.bias_E += 1e-3
    with pytest.raises(WeightSyncError, match=r"1 of 2\d tensors.*blocks\.1\.ffn\.router\.bias_E at replica 1 differs"):
        proven.push(model, 1)


def test_one_that_dies_is_restarted_alone(make, model, prompts, tmp_path):
    engine, recovered = make("Remembering", "Remembering", marker=str(tmp_path / "died")), []
    engine.recovered = lambda again, model, version: recovered.append((again, version))
    engine.push(model, 2)
    pids = [one.process.pid for one in engine.engines]
    found = engine.generate(prompts(4), Sampling(), [6, 7, 8, 9])
    assert [c.token_ids[:2] for c in found] == [(6, 2), (7, 2), (8, 2), (9, 2)]
    assert engine.engines[0].process.pid == pids[0] and engine.engines[1].process.pid != pids[1]
    assert recovered == [(engine.engines[1], 2)]


def test_one_that_is_lost_ends_all_at_once(make, model, prompts, tmp_path):
    engine = make("Sleeping", "Remembering", marker=str(tmp_path / "died"), always=True)
    engine.push(model, 0)
    pids, began = [one.process.pid for one in engine.engines], time.monotonic()
    with pytest.raises(EngineDiedError, match="killed by signal 9"):
        engine.generate(prompts(2), Sampling(), [1, 2])
    assert time.monotonic() - began < 60 and engine.version() == -1
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_refused_push_leaves_no_version(make, model, prompts):
    engine = make("Remembering", "Refusing")
    engine.push(model, 0)
    with pytest.raises(WeightSyncError, match="refused the weights of version 1"):
        engine.push(model, 1)
    assert engine.version() == -1
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(prompts(2), Sampling(), [1, 2])
    engine.push(model, 2)
    assert engine.version() == 2


def test_a_wrong_request_ends_none(two, model, prompts):
    two.push(model, 0)
    with pytest.raises(RolloutError, match="2 prompts and 1 seeds"):
        two.generate(prompts(2), Sampling(), [1])
    with pytest.raises(RolloutError, match="2 prompts and 1 limits"):
        two.generate(prompts(2), Sampling(), [1, 2], limits=[4])
    assert two.version() == 0 and len(two.generate(prompts(2), Sampling(max_tokens=2), [1, 2])) == 2
    with pytest.raises(ConfigError, match="at least one"):
        Replicas([])


def test_progress_adds_up():
    heard = []
    together = Together([slice(0, 3), slice(3, 8)], heard.append)
    together.of(1)(Progress(2, 5, 30, 1.5))
    together.of(0)(Progress(3, 3, 20, 1.0))
    assert heard == [Progress(2, 8, 30, 1.5), Progress(5, 8, 50, 1.5)]


def test_places_that_do_not_agree():
    held = Held("float32", (2,), 7)
    other = Held("float32", (2,), 8)
    assert agreed({"a": {"w": held}, "b": {"w": held}}) == {"w": held}
    assert agreed({"a": {"w": held}, "b": {"w": other}}) == {"w at a": held, "w at b": other}
    with pytest.raises(WeightSyncError, match=r"b and a do not have the same tensors: \['v'\]"):
        agreed({"a": {"w": held}, "b": {"w": held, "v": other}})
    said = {
        "a": [NextToken({1: -0.1}, 0), NextToken({2: -0.2}, 8)],
        "b": [NextToken({3: -0.3}, 0), NextToken({4: 0}, 9)],
    }
    assert in_turn(said) == [NextToken({1: -0.1}, 0), NextToken({4: 0}, 9)]
    said["b"][0] = NextToken({3: -0.3}, 4)
    with pytest.raises(WeightSyncError, match=r"prefix caches, in tokens: \{'a': 0, 'b': 4\}"):
        in_turn(said)
