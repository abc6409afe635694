"""The engine gives its memory to the trainer between rounds: when it does, and that nothing else changes."""

from dataclasses import replace

import pytest

from lit_reason.data import ByteTokenizer
from lit_reason.errors import ConfigError, RolloutError
from lit_reason.loop import RoundShape
from lit_reason.models.checksum import checksum
from lit_reason.rollout import BuiltinEngine

SHAPE = {"rounds": 3, "prompts_per_round": 3, "group_size": 4, "micro_batches": 2}


class Napping(BuiltinEngine):
    """Drops its weights when it sleeps, as level 2 does."""

    sleeps = True

    def __init__(self):
        super().__init__(ByteTokenizer(), dtype="bfloat16")
        self.naps = []

    def sleep(self, level):
        if self._model is None:
            raise RolloutError("sleeps already")
        self.naps.append((level, self.version()))
        self._model = None


def test_it_sleeps_from_the_end_of_generation_to_the_next_push(stub, make_loop):
    stub = stub()
    stages = replace(stub.stages(), sleep=lambda level: stub.events.append(f"sleep {level}"))
    batches = list(make_loop(stages, sleep=2, **SHAPE | {"rounds": 2}))
    one = ["generate", "score", "sleep 2", "old", "old", "assess"]
    assert len(batches) == 4 and stub.events == ["push 0", *one, "push 1", *one]


def test_all_refills_of_a_round_are_generated_before_it_sleeps(stub, make_loop):
    stub = stub()
    quiet = replace(
        stub.stages(),
        sleep=lambda level: stub.events.append("sleep"),
        informative=lambda values_BR, weights_R, group_B, valid_B: valid_B & False,
    )
    next(make_loop(quiet, sleep=1, refills=2, **SHAPE))
    assert [event for event in stub.events if event in ("generate", "sleep")] == ["generate"] * 3 + ["sleep"]


def test_a_run_is_the_same_with_an_engine_that_sleeps(real_run):
    runs = [
        real_run(name, shape=RoundShape(**SHAPE, sleep=sleep), engine=Napping())
        for name, sleep in (("never", 0), ("dropped", 2))
    ]
    for run in runs:
        run.trainer.fit(run.policy, run.loop)
    assert [run.engine.naps for run in runs] == [[], [(2, 0), (2, 1), (2, 2)]]
    assert runs[0].completions == runs[1].completions and runs[0].completions
    assert checksum(runs[0].policy.model) == checksum(runs[1].policy.model)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"sleep": 3}, r"sleep=3: valid 0 \(off\), 1 .*, 2"),
        ({"sleep": -1}, r"sleep=-1: must be 0 \(off\) or more"),
        ({"sleep": 2, "staleness": 1}, r"sleep=2 with staleness=1.*Type rollout\.shape\.sleep=0, or"),
    ],
)
def test_shapes_that_are_refused(shape, said):
    with pytest.raises(ConfigError, match=said):
        RoundShape(**shape)


def test_an_engine_that_cannot_is_refused_before_anything_is_generated(real_run):
    with pytest.raises(ConfigError, match=r"sleep=1: this engine keeps its memory.*or rollout=vllm"):
        real_run("awake", shape=RoundShape(**SHAPE, sleep=1))
