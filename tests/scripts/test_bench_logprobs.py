"""The benchmark's sides do the same work, and its ratios are ours over the rival's."""

from argparse import Namespace

import pytest

from lit_reason.errors import ConfigError
from lit_reason.modules import chunked


@pytest.fixture(scope="module")
def bench(load):
    return load("bench_logprobs")


def test_sides_agree(bench, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 1000)
    found = {side: bench.measure(side, tokens=64, vocabulary=200, width=16, seed=0) for side in bench.SIDES}
    for rival, digits in (("float32", 1e-4), ("bfloat16", 2e-2)):
        for key in ("loss", "weight_grad", "states_grad"):
            assert found["ours"][key] == pytest.approx(found[rival][key], rel=digits), (rival, key)


def test_ratios_are_ours_over_the_rivals(bench):
    def of(seconds, mib):
        return [{"processor_s": s, "wall_s": 2 * s, "peak_mib": mib} for s in seconds]

    found = bench.ratios({"ours": of([1.0, 3.0, 9.0], 5.0), "float32": of([2.0, 4.0, 4.0], 50.0)})
    assert found == {"float32": {"time": 0.75, "time_of_least": 0.5, "wall": 0.75, "memory": 0.1}}


def test_what_does_not_fit_is_refused_with_what_would(bench):
    args = Namespace(batch=8, tokens=10**6, vocabulary=128_000, width=1024)
    with pytest.raises(ConfigError, match=r"float32 needs about 14\d{3} GB, free are .* type --tokens \d+, or"):
        bench.check_fits("float32", args)
