"""Several engines as one: what they make, what they say they hold, and how they end. The processes are real."""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lit_reason.cli.engines import _make_engine
from lit_reason.errors import ConfigError, EngineDiedError, RolloutError, WeightSyncError
from lit_reason.models.export import checkpoint_tensors
from lit_reason.rollout import BuiltinEngine, BuiltinProcess, Provable, Replicas, Sampling
from lit_reason.rollout.engine import Engine, Held, Progress
from lit_reason.rollout.hosted import HostedEngine
from lit_reason.rollout.replicas import Together, agreed, cut
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
    assert engine.version() == -1 and engine.engines[0].process.alive
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(prompts(2), Sampling(), [1, 2])
    engine.push(model, 2)
    assert engine.version() == 2


def test_a_wrong_request_is_refused_before_anything_is_dealt(two, model, prompts):
    two.push(model, 0)
    pids = [one.process.pid for one in two.engines]
    with pytest.raises(RolloutError, match="2 prompts and 1 seeds"):
        two.generate(prompts(2), Sampling(), [1])
    with pytest.raises(RolloutError, match="2 prompts and 1 limits"):
        two.generate(prompts(2), Sampling(), [1, 2], limits=[4])
    long = dataclasses.replace(prompts(1)[0], token_ids=(5,) * 64)
    began = []
    for engine in two.engines:
        engine.generate = lambda *a: began.append(a)  # type: ignore[method-assign]
    with pytest.raises(RolloutError, match=r"has 64 tokens; valid 1\.\.63"):
        two.generate([*prompts(3), long], Sampling(), [1, 2, 3, 4])
    for engine in two.engines:
        del engine.generate
    assert not began and [one.process.pid for one in two.engines] == pids and two.version() == 0
    assert len(two.generate(prompts(2), Sampling(max_tokens=2), [1, 2])) == 2
    with pytest.raises(ConfigError, match="at least one"):
        Replicas([])


def test_an_error_of_one_ends_none(make, model, prompts):
    engine = make("Remembering", "Failing")
    engine.push(model, 0)
    pids = [one.process.pid for one in engine.engines]
    with pytest.raises(RolloutError, match="no spoon"):
        engine.generate(prompts(2), Sampling(), [1, 2])
    assert [one.process.pid for one in engine.engines] == pids and engine.version() == 0


def test_a_dead_one_is_no_end_of_the_others(model, prompts, two):
    """It dies while the policy trains: the question before the next push finds it, the push replaces it alone."""
    proven = ProvenEngine(two, Proof([prompt.token_ids for prompt in prompts(4)]))
    proven.push(model, 0)
    first, second = (one.process for one in two.engines)
    os.kill(second.pid, signal.SIGKILL)
    second._process.wait()
    proven.push(model, 1)
    assert two.engines[0].process is first and two.engines[1].process.pid != second.pid and two.version() == 1


def test_two_that_stall_at_once_leave_the_policy_in_training(model, prompts, two):
    proven = ProvenEngine(two, Proof([prompt.token_ids for prompt in prompts(4)]))
    model.train()
    proven.push(model, 0)
    for one in two.engines:
        os.kill(one.process.pid, signal.SIGSTOP)
        one.deadlines = dataclasses.replace(one.deadlines, generate=2.0)
    assert len(proven.generate(prompts(4), Sampling(max_tokens=2), range(4))) == 4
    assert model.training


def test_close_ends_what_other_threads_wait_for(make, model, prompts):
    engine, starting = make("Sleeping", "Sleeping"), make("Starting")
    engine.push(model, 0)

    def ends(closed, work, *args):
        failed = []

        def run():
            try:
                work(*args)
            except EngineDiedError as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while any(one._process is None for one in closed.engines):
            time.sleep(0.05)
        time.sleep(0.5)
        closed.close()
        thread.join(timeout=20)
        return bool(failed) and not thread.is_alive()

    assert ends(engine, engine.generate, prompts(2), Sampling(), [1, 2])
    assert ends(starting, starting.push, model, 0)


def test_a_model_on_a_gpu_is_refused(two):
    model = torch.nn.Linear(1, 1, device="meta")
    with pytest.raises(ConfigError, match=r"rollout\.replicas=2 for a model on meta.*or rollout=vllm_server"):
        two.push(model, 0)


def test_cores_are_dealt_out(tokenizer):
    engine = {"_target_": "lit_reason.rollout.BuiltinProcess", "_partial_": True, "cores": [3, 5, 7]}
    cfg = OmegaConf.create({"allow_targets": [], "rollout": {"replicas": 2, "engine": engine}})
    two = _make_engine(cfg, tokenizer)
    assert isinstance(two, Replicas) and [one.cores for one in two.engines] == [[3, 7], [5]]
    cfg.rollout.replicas = 1
    assert _make_engine(cfg, tokenizer).cores == [3, 5, 7]


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
