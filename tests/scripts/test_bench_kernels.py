"""The kernels' targets from made-up rows, what is written and read back, and every case once, tiny, on the CPU."""

import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lit_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_kernels.py"


@pytest.fixture(scope="module")
def script(load):
    return load("bench_kernels")


@pytest.fixture(scope="module")
def bench(script):
    from bench import kernels_compare, kernels_measure, kernels_record, kernels_report, kernels_run, kernels_targets

    class Modules:
        compare, measure, record = kernels_compare, kernels_measure, kernels_record
        report, run, targets = kernels_report, kernels_run, kernels_targets

    return Modules


def side(ms, **more):
    return {"ms": {"median": ms, "min": ms, "max": ms}, "repetitions": 5, **more}


def row(group, kind, shape, sides, judged=True, **more):
    return {"group": group, "kind": kind, "shape": list(shape), "judged": judged, "sides": sides, **more}


def record(*rows, gpu="NVIDIA H200"):
    groups = {}
    for one in rows:
        group = {"date": "2026-01-02 03:04:05 +0000", "versions": {"torch": "2.11", "triton": "3.6"}, "rows": []}
        groups.setdefault(one["group"], group)["rows"].append(one)
    return {"gpu": gpu, "groups": groups}


def found(bench, words, *rows):
    """State and text of the target that says `words`."""
    (target,) = [t for t in bench.targets.TARGETS if words in f"{t.kernel}: {t.words}"]
    return bench.targets.judge(target, rows)[1:]


def test_share_of_the_copy_is_that_of_the_worst(bench):
    rows = [
        row("quantise", kind, (8, 8), {"triton": side(1.0, gb_per_s=speed), "copy": side(1.0, gb_per_s=4000.0)})
        for kind, speed in (("rows", 3800.0), ("blocks", 3600.0), ("both", 3440.0))
    ]
    words = "quantise 1x128 / 128x128 / fused dual (row + transposed): >= 85% of the measured copy bandwidth"
    assert found(bench, words, *rows) == ("met", "86% (both 8x8)")
    rows[0]["sides"]["triton"]["gb_per_s"] = 3200.0
    assert found(bench, words, *rows) == ("missed", "80% (rows 8x8), by 5 points")
    assert found(bench, words, *rows[:2]) == ("unmeasured", "no row of quantise: both")
    rows.append(row("quantise", "rows", (1, 1), {"triton": side(9.0, gb_per_s=1.0), "copy": side(1.0)}, judged=False))
    assert found(bench, words, *rows) == ("missed", "80% (rows 8x8), by 5 points")


def test_a_ratio_takes_the_fastest_rival_and_only_shapes_that_it_can_do(bench):
    moe = row("moe", "fwd+bwd", (1, 2), {"triton": side(2.0), "bf16": side(3.0), "bf16 by ours": side(2.2)})
    assert found(bench, ">= 1.2x bf16 at 7168x2048", moe) == ("missed", "1.10x (fwd+bwd 1x2), by 0.10x")
    no = {"error": "ValueError: N"}
    a = row("dense", "fwd", (1, 1, 1), {"triton": side(1.0), "torch": no, "F.scaled_mm": no})
    b = row("dense", "fwd", (2, 2, 2), {"triton": side(1.0), "torch": side(1.0), "F.scaled_mm": side(0.8)})
    assert found(bench, "Triton fwd >= 0.70x", a, b) == ("met", "0.80x (fwd 2x2x2)")
    assert found(bench, "Triton fwd >= 0.70x", a) == ("unmeasured", "fwd 1x1x1, F.scaled_mm: ValueError: N")


def test_ours_failing_is_a_miss(bench):
    shape = bench.targets.LARGE
    bad = row("grouped_fp8", "fwd", shape, {"triton": {"error": "OutOfMemoryError: big"}, "F.grouped_mm": side(1.0)})
    state, text = found(bench, "fwd >= 900 TFLOP/s", bad)
    assert state == "missed" and text.endswith("triton: OutOfMemoryError: big")
    hung = row("grouped_fp8", "fwd", shape, {}, error="no answer within 90 s")
    assert found(bench, "fwd >= 900 TFLOP/s", hung) == ("missed", "fwd 8x4096x4096x7168: no answer within 90 s")
    good = row("grouped_fp8", "fwd", shape, {"triton": side(1.0, tflop_per_s=950.0), "F.grouped_mm": side(1.5)})
    assert found(bench, "fwd >= 900 TFLOP/s", good) == ("met", "950 TFLOP/s (fwd 8x4096x4096x7168)")
    assert found(bench, "fwd >= 1.4x bf16", good) == ("met", "1.50x (fwd 8x4096x4096x7168)")


def test_what_must_be_at_most(bench):
    sides = {
        "triton": side(96.0, peak_mib=2500.0), "naive": side(200.0, peak_mib=6000.0), "bare GEMMs": side(64.0)
    }  # fmt: skip
    rows = [row("logprobs", kind, (4, 5, 6), sides, checks={"repeats": True, "largest": 0.0}) for kind in
            ("fwd+bwd", "peaked")]  # fmt: skip
    assert found(bench, "<= 1.6x the bare lm_head GEMMs", *rows) == ("met", "1.50x (fwd+bwd 4x5x6)")
    assert found(bench, "peak memory <= 1/3", *rows) == ("missed", "0.42x (fwd+bwd 4x5x6), by 0.08x")
    assert found(bench, "log-probs <= 0", *rows)[0] == "met"
    rows[1]["checks"] = {"repeats": True, "largest": 1e-7}
    assert found(bench, "log-probs <= 0", *rows)[0] == "missed"


def test_checks_that_are_false_or_not_a_number_are_misses(bench):
    good = row("dense", "fwd", (1, 1, 1), {"triton": side(1.0)}, checks={"repeats": True, "diff": 7e-4, "sqnr": 28.5})
    assert found(bench, "against the bf16 product", good) == ("met", "7.00e-04 (dense fwd 1x1x1)")
    assert found(bench, "SQNR >= 28 dB", good) == ("met", "28.5 dB (dense fwd 1x1x1)")
    bad = {**good, "shape": [2, 2, 2], "checks": {"repeats": False, "diff": None, "sqnr": 27.0}}
    assert found(bench, "against the bf16 product", good, bad) == ("missed", "dense fwd 2x2x2: not a number")
    assert found(bench, "SQNR >= 28 dB", good, bad) == ("missed", "27.0 dB (dense fwd 2x2x2), by 1.0 dB")
    assert found(bench, "identical from run to run", good, bad)[0] == "missed"


def test_without_files_everything_is_unmeasured_and_that_is_no_failure(bench):
    lines, good = bench.report.check([])
    assert good and len(lines) == len(bench.targets.TARGETS)
    assert all(line.startswith("unmeasured") and line.endswith("no H200") for line in lines)
    text = bench.report.markdown([])
    assert "Nothing is measured yet" in text and "scripts/bench_kernels.py" in text
    assert text.count("unmeasured") == len(bench.targets.TARGETS)


def test_check_fails_on_a_miss_and_judges_no_other_gpu(bench):
    slow = row("swiglu", "fwd", (1, 1), {name: side(2.0, gb_per_s=4e3) for name in ("triton", "unfused", "copy")})
    rows = [slow, {**slow, "kind": "bwd"}, {**slow, "kind": "quantised"}]
    lines, good = bench.report.check([record(*rows)])
    assert not good
    assert [x for x in lines if x.startswith("missed")] == [
        "missed      SwiGLU (+quant) fwd/bwd: >= 1.6x unfused: 1.00x (fwd 1x1), by 0.60x, NVIDIA H200"
    ]
    lines, good = bench.report.check([record(*rows, gpu="NVIDIA L4")])
    assert good and lines[0].startswith("not judged  NVIDIA L4")
    assert "1.00x (fwd 1x1), by 0.60x" in bench.report.markdown([record(*rows)])


def test_the_table_is_what_dispatch_reads(bench, tmp_path, monkeypatch):
    right, wrong = {"repeats": True, "diff": 1e-6}, {"repeats": True, "diff": 0.5}

    def timed(shape, kind, triton, torch_, checks=right):
        sides = {"triton": triton, "torch": torch_}
        return row("rms_norm", kind, shape, sides, op="rms_norm", dispatched=list(shape), checks=checks)

    gone = {"error": "RuntimeError: no"}
    made = record(
        timed((4096, 7168), "fwd", side(1.0), side(1.5)), timed((4096, 7168), "bwd", side(3.0), side(2.75)),
        timed((64, 64), "fwd", side(1.0), side(1.5)), timed((64, 64), "bwd", side(3.0), side(2.0)),
        timed((8, 65536), "fwd", side(0.1), side(1.0), wrong), timed((65536, 8), "fwd", gone, side(1.0)),
        timed((9, 9), "fwd", side(1.0), gone), timed((9, 9), "bwd", gone, gone),
    )  # fmt: skip
    assert bench.record.dispatch_table(made) == {
        "rms_norm": [
            {"shape": [4096, 7168], "torch": 4.25, "triton": 4.0},
            {"shape": [64, 64], "torch": 3.5, "triton": 4.0},
            {"shape": [8, 65536], "torch": 1.0},
            {"shape": [65536, 8], "torch": 1.0},
        ]
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"NVIDIA L4": {"permute": []}}))
    bench.record.write_dispatch_table(path, made)
    monkeypatch.setattr(dispatch, "TABLE", path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    dispatch.table.cache_clear()
    dispatch._measured.cache_clear()
    try:
        assert set(dispatch.table()) == {"NVIDIA L4", "NVIDIA H200"}
        choices = {s: dispatch.choose("rms_norm", "auto", torch.device("cuda"), s) for s in ((4000, 7000), (64, 60))}
    finally:
        dispatch.table.cache_clear()
        dispatch._measured.cache_clear()
    assert choices[4000, 7000] == ("triton", "at (4096, 7168) on NVIDIA H200: torch 4.25 ms, triton 4 ms")
    assert choices[64, 60].backend == "torch"


def test_a_record_survives_the_file_and_infinities_become_null(bench, tmp_path):
    path = tmp_path / bench.record.file_name("NVIDIA H200 (SXM)")
    assert path.name == "nvidia-h200-sxm.json"
    made = record(row("dense", "fwd", (1, 2, 3), {"triton": side(1.5)}, checks={"diff": math.nan, "repeats": True}))
    bench.record.write(path, made)
    made["groups"]["dense"]["rows"][0]["checks"]["diff"] = None
    assert bench.record.records(tmp_path) == [made]
    assert bench.record.groups_so_far(path) == made["groups"]


def test_closeness_is_that_of_the_formulas(bench):
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
    checks = bench.compare.closeness((y, x), (x, x))
    assert checks["diff"] == pytest.approx(1 - 2 * 29 / (25 + 34))
    assert checks["sqnr"] == pytest.approx(10 * math.log10(25 / 1))
    assert math.isnan(bench.compare.closeness(torch.tensor([math.nan]), torch.ones(1))["diff"])
    assert bench.compare.same((x, (y,)), (x.clone(), (y.clone(),))) and not bench.compare.same(x, y)
    assert bench.compare.same(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not bench.compare.same(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_a_side_that_fails_leaves_the_others(bench):
    def fails():
        raise ValueError("no such shape\nand more")

    def make(place, n):
        x = torch.ones(n)
        return bench.measure.Made({"triton": lambda: x + 1, "torch": fails}, lambda: x + 1, bytes=8 * n)

    got = bench.measure.measure(bench.measure.Case("g", "k", (4,), make), bench.measure.CPU, 0)
    assert got["sides"]["torch"] == {"error": "ValueError: no such shape"}
    assert got["sides"]["triton"]["gb_per_s"] == pytest.approx(32 / got["sides"]["triton"]["ms"]["median"] / 1e6)
    assert set(got["sides"]) == {"triton", "torch", "copy"} and got["checks"]["diff"] == 0


class Event:
    """Of a GPU on which the first thing timed in a program takes 1 ms, the next 2 ms, and so on."""

    clock = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.clock += 1
        self.at = Event.clock

    def elapsed_time(self, other):
        assert other.at == self.at + 1  # nothing is timed around it
        return float(other.at // 2)


@pytest.fixture
def gpu(bench, monkeypatch):
    """A place that is called a GPU: the CPU, with CUDA's calls noted."""
    calls = []

    class Place(bench.measure.Place):
        is_gpu = True

    monkeypatch.setattr(Event, "clock", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(bench.measure, "FLUSH", 16)
    monkeypatch.setattr(bench.measure, "COPIED", 3_000_000)
    return Place(torch.device("cpu"), "torch", "emulate"), calls


def test_on_a_gpu_sides_take_turns_between_events(bench, gpu):
    place, calls = gpu
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench.measure.interleaved(sides, place, seconds=0)
    assert order == list("ab" + "abba" * 2 + "ab")  # one round to see how long it takes, then the least number, 5
    assert times == {"a": [3.0, 6.0, 7.0, 10.0, 11.0], "b": [4.0, 5.0, 8.0, 9.0, 12.0]}
    assert calls == ["wait", "wait", "synchronize"] * 6


def test_on_a_gpu_a_row_has_rates_of_the_median_and_peaks(bench, gpu):
    def make(place, n):
        x = torch.ones(n)
        return bench.measure.Made({"triton": lambda: x + 1}, lambda: x + 1, bytes=4_000_000, flops=10**9, memory=True)

    got = bench.measure.measure(bench.measure.Case("g", "k", (4,), make), gpu[0], 0)["sides"]
    assert got["triton"]["ms"] == {"median": 7.0, "min": 3.0, "max": 11.0} and got["triton"]["repetitions"] == 5
    assert got["triton"]["gb_per_s"] == pytest.approx(4e6 / 7e-3 / 1e9)
    assert got["triton"]["tflop_per_s"] == pytest.approx(1e9 / 7e-3 / 1e12)
    assert got["copy"]["ms"]["median"] == 8.0 and "tflop_per_s" not in got["copy"]
    assert got["copy"]["gb_per_s"] == pytest.approx(2 * 3e6 / 8e-3 / 1e9)
    assert got["triton"]["peak_mib"] == 4.0


def test_a_side_that_takes_the_gpu_along_ends_the_case(bench, gpu, monkeypatch):
    def fails():
        def dead():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", dead)

    case = bench.measure.Case("g", "k", (), lambda place: bench.measure.Made({"triton": fails}))
    with pytest.raises(RuntimeError, match="triton: RuntimeError: CUDA error: an illegal memory access"):
        bench.measure.measure(case, gpu[0], 0)


def _crashing(theirs, cases, group, dry, seconds, first):
    """Answers the first case, hangs at the second, dies at the third, fails the fourth."""
    import os

    if first == 1:
        time.sleep(60)
    if first == 2:
        os._exit(7)
    theirs.send({"error": "RuntimeError: no"} if first == 3 else {"sides": {}, "of": first})
    if first == 0:
        time.sleep(60)


def test_a_case_that_hangs_or_dies_is_its_own_error(bench, monkeypatch):
    """By fork, since a spawned child could not import this file."""
    from multiprocessing import get_context

    monkeypatch.setattr(bench.run.multiprocessing, "get_context", lambda _: get_context("fork"))
    monkeypatch.setattr(bench.run, "STARTING", 0.0)
    todo = [bench.measure.Case("g", str(i), (i,), lambda place: None) for i in range(4)]
    rows = list(bench.run.rows_of(lambda group, dry: todo, "g", True, 0, 1.0, _crashing))
    assert [r.get("kind", r.get("of")) for r in rows] == [0, "1", "2", "3"]
    assert [r.get("error") for r in rows] == [
        None, "no answer within 1 s", "its process ended with exit code 7", "RuntimeError: no"
    ]  # fmt: skip


def test_without_a_gpu_it_says_so_and_what_works(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no NVIDIA GPU" in line and "--check" in line and "--dry-run" in line


def test_the_script_writes_a_table_and_keeps_the_other_groups(tmp_path):
    path = tmp_path / "dry-run.json"
    path.write_text(json.dumps({"gpu": "dry run", "groups": {"dense": {"rows": []}, "swiglu": {"rows": [1]}}}))
    command = [sys.executable, str(SCRIPT), "--dry-run", "--only", "swiglu", "--commit", "abc", "--out", str(tmp_path)]
    env = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, capture_output=True, check=True, env=env)
    groups = json.loads(path.read_text())["groups"]
    assert groups["dense"] == {"rows": []} and groups["swiglu"]["commit"] == "abc"
    assert [one["kind"] for one in groups["swiglu"]["rows"]] == ["fwd", "bwd", "quantised"]
    assert all("error" not in one and one["took_s"] > 0 for one in groups["swiglu"]["rows"])
    (entry,) = json.loads((tmp_path / "measured.json").read_text())["dry run"]["silu_mul"]
    fwd, bwd, _ = (one["sides"]["triton"]["ms"]["median"] for one in groups["swiglu"]["rows"])
    assert entry["shape"] == [32, 256] and entry["triton"] == pytest.approx(fwd + bwd, rel=1e-3)


@pytest.fixture(scope="module")
def dry(script, bench):
    """Rows of every case, once: ours in torch, FP8 products emulated."""
    todo = [case for group in script.GROUPS for case in script.cases(group, True)]
    return [bench.measure.measure(case, bench.measure.CPU, 0) for case in todo]


def test_every_case_runs_and_what_needs_a_gpu_says_so(bench, dry):
    failed = {(name, s["error"].split(":")[0]) for r in dry for name, s in r["sides"].items() if "error" in s}
    assert failed == {
        ("torch", "UnsupportedError"), ("auto", "UnsupportedError"),
        ("F.scaled_mm", "ValueError"), ("FP8, block scales", "ValueError"),
    }  # fmt: skip
    ours = [one for one in dry if one["group"] != "ceilings"]
    assert all("ms" in one["sides"]["triton"] and one["checks"]["repeats"] for one in ours)
    assert all(one["checks"].get("exact", True) and one["checks"].get("diff", 0) < 4e-3 for one in ours)
    assert set(bench.record.dispatch_table({"groups": {"all": {"rows": dry}}})) == {
        "quantise_rows", "quantise_blocks", "quantise_both", "fp8_gemm", "silu_mul", "rms_norm", "permute",
        "unpermute", "linear_logprobs", "grouped_mm", "fp8_grouped_mm",
    }  # fmt: skip


def test_every_target_finds_its_cases_and_rivals(script, bench, dry):
    """With the sides and checks that the cases have, at the shapes that a GPU measures."""
    fast, slow = (side(ms, gb_per_s=1 / ms, tflop_per_s=1e3 / ms, peak_mib=ms) for ms in (1.0, 20.0))
    numbers = {"repeats": True, "exact": True, "diff": 1e-4, "sqnr": 30.0, "largest": -1.0}
    of = {(one["group"], one["kind"]): one for one in dry}
    rows = []
    for case in (case for group in script.GROUPS for case in script.cases(group, False)):
        tiny = of[case.group, case.kind]
        sides = {name: fast if name in ("triton", "copy") else slow for name in tiny["sides"]}
        checks = {key: numbers[key] for key in tiny.get("checks", ())}
        rows.append(row(case.group, case.kind, case.shape, sides, case.judged, checks=checks))
    verdicts = [bench.targets.judge(target, rows) for target in bench.targets.TARGETS]
    assert [v for v in verdicts if v.state != "met"] == []
    assert "Ceilings there: copy" in bench.report.source(record(*rows))


def test_names_and_shapes_are_those_that_operations_choose_by(script, bench, monkeypatch):
    asked = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", None)  # whoever looks it up there is not noted below

    def noted(op, backend, device, shape, fp8=False):
        asked.append((op, tuple(shape)))
        return choose(op, backend, device, shape, fp8)

    for name in ("gemm", "grouped", "grouped_fp8", "logprobs", "permute", "quantise", "rms_norm", "swiglu"):
        monkeypatch.setattr(sys.modules[f"lit_kernels.{name}"], "choose", noted)
    for case in (case for group in script.GROUPS for case in script.cases(group, True) if case.op):
        asked.clear()
        made = case.make(bench.measure.CPU, *case.shape)
        with contextlib.suppress(dispatch.UnsupportedError):
            made.sides["torch"]()
        assert (case.op, case.dispatched) in asked, case
