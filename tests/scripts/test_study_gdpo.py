"""The pure parts of study_gdpo.py: counts against the paper, intervals by hand, tables from made-up runs."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def study(load):
    return load("study_gdpo")


@pytest.fixture(scope="module")
def gdpo(study):
    return study.gdpo


@pytest.fixture(scope="module")
def stats(study):
    return sys.modules["studies.stats"]


def test_distinct_groups_are_the_papers(gdpo):
    """Figure 2 of arXiv 2601.05242: two 0/1 rewards, then groups of 4."""
    sizes = range(2, 9)
    assert [gdpo.distinct_groups("GRPO", g, 2) for g in sizes] == [2, 4, 7, 11, 16, 22, 29]
    assert [gdpo.distinct_groups("GDPO", g, 2) for g in sizes] == [3, 6, 14, 26, 38, 59, 81]
    assert [gdpo.distinct_groups("GRPO without std", g, 2) for g in sizes] == [3, 6, 10, 15, 21, 28, 36]
    assert [gdpo.distinct_groups("GRPO", 4, r) for r in (2, 3, 4)] == [7, 14, 23]
    assert [gdpo.distinct_groups("GDPO", 4, r) for r in (2, 3, 4)] == [14, 45, 127]


def test_without_std_the_sums_alone_are_told_apart(gdpo):
    """The centred sums of G completions: multisets of sums with the least one shifted to 0.

    Sums lie in 0 .. R. Of the C(G + R, R) multisets those without a 0 shift onto one with a 0; C(G - 1 + R, R) remain.
    """
    for g, r in ((3, 2), (4, 3), (5, 3)):
        assert gdpo.distinct_groups("GRPO without std", g, r) == math.comb(g - 1 + r, r)


def rows(*groups: list[tuple[float | None, ...]]) -> list[dict]:
    names = ("answer", "format", "length")
    return [
        {"sample_idx": i, "rewards": dict(zip(names, values, strict=True))}
        for group in groups
        for i, values in enumerate(group)
    ]


def test_resolution_of_a_round_by_hand(gdpo):
    """Group 1: sums 1, 1, 1: silent for sums. Group 2: sums 0, 1, 2. Group 3: all equal.

    GDPO, group 1: each column is one 1 among three, so every completion has +a - b - b: silent too. Group 2: columns
    (0, 1, 1), (0, 0, 1), (0, 0, 0): standardised (-2, 1, 1) / sqrt 3 and (-1, -1, 2) / sqrt 3, sum (-3, 0, 3) / sqrt 3.
    """
    played = rows(
        [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)],
        [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 0.0)],
        [(1.0, 1.0, 1.0)] * 3,
    )
    for arm in gdpo.ARMS:
        assert gdpo.resolution(arm, played) == pytest.approx(((1 + 3 + 1) / 3, 2, 2 / 3))
    group_B = torch.zeros(3, dtype=torch.long)
    rewards_BR = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert gdpo.advantages("GDPO", rewards_BR, group_B).tolist() == pytest.approx([-math.sqrt(3), 0, math.sqrt(3)])
    assert gdpo.all_three(played) == pytest.approx(3 / 9)


def test_credit_by_hand(gdpo):
    """Two groups that vary in one reward each: answer (0, 0, 0, 1), format (0, 0, 1, 1).

    Centred: (-1, -1, -1, 3) / 4 and (-1, -1, 1, 1) / 2, squares summing to 3/4 and 1. Without std the covariances are
    3/4 to 1; divided by the std, sqrt(3/4) to 1, for GDPO too: where one reward varies alone, both normalise alike.
    """
    played = rows(
        [(0.0, 1.0, 0.0)] * 3 + [(1.0, 1.0, 0.0)],
        [(1.0, 0.0, 0.0)] * 2 + [(1.0, 1.0, 0.0)] * 2,
    )
    assert gdpo.credit("GRPO without std", played) == pytest.approx([3 / 7, 4 / 7, 0])
    root = math.sqrt(3 / 4)
    for arm in ("GRPO", "GDPO"):
        assert gdpo.credit(arm, played) == pytest.approx([root / (1 + root), 1 / (1 + root), 0])


def test_a_rare_reward_has_more_credit_with_gdpo(gdpo):
    """One group, answer (0, 0, 1, 1), format (0, 1, 0, 0): centred dot products 1, 3/4, and -1/2 between the two.

    GRPO follows answer + format: covariances 1 - 1/2 and 3/4 - 1/2, 2 to 1. GDPO follows answer / 1 + format / root,
    root = sqrt(3/4): covariances 1 - 1/2 / root and 3/4 / root - 1/2.
    """
    played = rows([(0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)])
    assert gdpo.credit("GRPO", played) == pytest.approx([2 / 3, 1 / 3, 0])
    root = math.sqrt(3 / 4)
    answer, form = 1 - 0.5 / root, 0.75 / root - 0.5
    assert gdpo.credit("GDPO", played) == pytest.approx([answer / (answer + form), form / (answer + form), 0])
    assert form / (answer + form) > 1 / 3


def test_sums_hide_what_gdpo_sees(gdpo):
    """Group 1: sums 1, 1, 2, 2 as pairs that differ in *which* reward is earned; GRPO sees two values, GDPO four.

    Columns: answer (1, 0, 1, 1), format (0, 1, 1, 0), length (0, 0, 0, 1): 3, 2 and 1 ones of 4.
    """
    played = rows([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0)])
    assert gdpo.resolution("GRPO", played).values == 2
    assert gdpo.resolution("GDPO", played).values == 4


def test_what_no_verifier_judged_is_not_compared(gdpo):
    """Two equal completions and one without a verdict: nothing to tell apart, where a 0 in its place would."""
    played = rows([(1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.0, None, 0.0)])
    for arm in gdpo.ARMS:
        assert gdpo.resolution(arm, played) == (1, 1, 1)
    assert gdpo.all_three(played) == pytest.approx(2 / 3)


def test_unequal_groups_are_refused(gdpo):
    with pytest.raises(ValueError, match="3 completions in 2 groups"):
        gdpo.resolution("GRPO", rows([(1.0, 1.0, 1.0)], [(1.0, 1.0, 1.0)] * 2))


def test_t_interval_by_hand(stats):
    """1, 2, 3, 4, 5: s^2 = 10 / 4, standard error sqrt(2.5 / 5) = 0.70711, t = 2.7764 with 4 degrees of freedom."""
    found = stats.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == pytest.approx((3.0, 3.0 - 1.96322, 3.0 + 1.96322), abs=1e-4)
    assert found.text(".1f") == "3.0 [1.0, 5.0]"
    assert all(map(math.isnan, stats.t_interval([1.0])[1:]))
    for wrong in ([], [0.0] * 12):
        with pytest.raises(ValueError, match="valid: 1 to 11"):
            stats.t_interval(wrong)


def test_quantiles_of_t_leave_a_fortieth_above(stats):
    """By the density of Student's t: the mass between 0 and the quantile is 0.475 (midpoint rule)."""
    steps = 100_000
    for df, quantile in enumerate(stats.T_975, 1):
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        x = (torch.arange(steps, dtype=torch.float64) + 0.5) * quantile / steps
        mass = scale * ((1 + x**2 / df) ** (-(df + 1) / 2)).sum().item() * quantile / steps
        assert mass == pytest.approx(0.475, abs=2e-6)


def test_differences_are_paired_by_seed(stats):
    """Seeds that differ a lot, differences that do not: 0.1, 0.2, 0.3: 0.2 +- 4.3027 * 0.1 / sqrt 3."""
    found = stats.paired_interval({1: 1.1, 2: 5.2, 3: 9.3}, {3: 9.0, 2: 5.0, 1: 1.0})
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert found == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert stats.verdict(found) == "no difference shown" and stats.verdict(stats.Interval(1, 0.5, 1.5)) == "higher"
    assert stats.verdict(stats.Interval(-1, -1.5, -0.5)) == "lower"
    assert stats.verdict(stats.t_interval([1.0])) == "no difference shown"
    with pytest.raises(ValueError, match="needs the same"):
        stats.paired_interval({1: 0.0}, {2: 0.0})


def made_up(arm: str, seed: int, level: float) -> dict:
    """A run whose curves rise from 0 to `level` over the last 10 of 20 rounds' first step."""
    curve = [0.0] * 10 + [level] * 10
    seen = {other: [level, 1.0, 0.0] for other in ("GDPO", "GRPO", "GRPO without std")}
    names = ("answer", "format", "length")
    return {
        "arm": arm,
        "seed": seed,
        "held_out": dict.fromkeys((*names, "total", "answer_anywhere"), level / 2),
        "curves": dict.fromkeys((*names, "all three"), curve),
        "resolution": seen,
        "credit": seen,
    }


def test_differences_over_problems_average_seeds_first(gdpo):
    """Of 60 problems GDPO is right on the first with both seeds, on the second with one; GRPO on the third, twice.

    1 - 0, 1/2 - 0, 0 - 1: sum 1/2. Every problem is in form with GDPO and none with GRPO: the interval is right of 0.
    """

    def items(answers: list[float], form: float) -> list[dict]:
        columns = [{"answer": answer, "format": form, "length": 1.0, "answer_anywhere": 1.0} for answer in answers]
        return [{"prompt_id": f"p{i}", "columns": column} for i, column in enumerate(columns)]

    played = {
        ("GDPO", 1): items([1.0, 1.0, 0.0] + [0.0] * 57, 1.0),
        ("GRPO", 1): items([0.0, 0.0, 1.0] + [0.0] * 57, 0.0),
        ("GDPO", 2): items([1.0, 0.0, 0.0] + [0.0] * 57, 1.0),
        ("GRPO", 2): items([0.0, 0.0, 1.0] + [0.0] * 57, 0.0),
    }
    found = gdpo.over_problems(played)
    assert found["answer"]["GDPO minus"]["GRPO"].mean == pytest.approx(0.5 / 60)
    assert found["answer"]["GDPO minus"]["GRPO"].low < 0 < found["answer"]["GDPO minus"]["GRPO"].high
    assert found["format"]["GDPO minus"]["GRPO"].mean == 1 and found["format"]["GDPO minus"]["GRPO"].low > 0.9
    assert gdpo.means(played["GDPO", 1]) == pytest.approx(
        {"answer": 2 / 60, "format": 1, "length": 1, "answer_anywhere": 1, "total": 2 + 2 / 60}
    )


def test_tables_of_made_up_runs(gdpo):
    """GDPO 0.3, 0.5, 0.7: mean 0.5, s = 0.2, half-width 4.3027 * 0.2 / sqrt 3 = 0.497; GRPO is 0.1 below everywhere."""
    runs = []
    for seed, level in enumerate((0.3, 0.5, 0.7)):
        runs += [made_up("GDPO", seed, level), made_up("GRPO", seed, level - 0.1)]
        runs += [made_up("GRPO without std", seed, level + (0.01 if seed else -0.01))]
    record = {"summary": gdpo.summary(runs), "runs": runs}
    assert "| GDPO | 0.500 [0.003, 0.997] |" in gdpo.levels_table(record, "last 10 rounds")
    record["start"] = dict.fromkeys(gdpo.HELD_OUT, 0.125)
    assert "| the start | 0.125 | 0.125 | 0.125 | 0.125 | 0.125 |\n| GDPO | 0.250 [0.002, 0.498] |" in (
        gdpo.held_out_table(record)
    )
    differences = gdpo.differences_table(record).splitlines()
    line = next(line for line in differences if line.startswith("| last 10 rounds: answer"))
    assert "+0.100 [+0.100, +0.100] | higher | -0.003 [-0.032, +0.025] | no difference shown" in line
    line = next(line for line in differences if line.startswith("| all rounds: format"))
    assert "| +0.050 [+0.050, +0.050] | higher |" in line
    assert "| GDPO | GRPO | 0.50 [0.00, 1.00] |" in gdpo.resolution_table(record)
    assert "| GRPO | GDPO | 0.400 [-0.097, 0.897] | 1.000 [1.000, 1.000] |" in gdpo.credit_table(record)


@pytest.fixture
def small(study, monkeypatch, tmp_path):
    runs = sys.modules["studies.runs"]
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return runs


def test_what_is_done_is_not_run_again_and_other_settings_are_told(small, tmp_path, capsys):
    """A training that could not run: an unknown override."""
    training = small.Training("a", ("no_such_key=1",))
    with pytest.raises(SystemExit, match=r"lit_reason.cli.train ended with code 2; read .*a\.log"):
        small.run_missing([training], small.Path("studies"))
    assert "no_such_key" in (tmp_path / "studies" / "a.log").read_text()
    (tmp_path / "studies" / "a" / "rl").mkdir()
    (tmp_path / "studies" / "a" / "rl" / "done.json").write_text("{}")
    small.run_missing([training], small.Path("studies"))
    assert "1 of 1 trainings are done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"other settings \(no_such_key=1, seed=2\)"):
        small.run_missing([small.Training("a", ("seed=2",))], small.Path("studies"))


def test_the_stored_record_says_what_its_page_shows(study):
    """The intervals stored are those of the runs stored."""
    record = json.loads(study.RECORD.read_text())
    fresh = study.gdpo.summary(record["runs"])
    for where, columns in record["summary"].items():
        for name, column in columns.items():
            for arm, interval in column.get("arms", {}).items():
                assert interval == pytest.approx(list(fresh[where][name]["arms"][arm]), abs=1e-5)
