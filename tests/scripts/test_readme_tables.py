"""The generated tables are what the code and the benchmark files say."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables(load):
    return load("readme_tables")


def test_pages_are_in_step(tables):
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.fill(page, text) == text, f"{page}: type python scripts/readme_tables.py"


def test_fill_replaces_what_is_stale(tables):
    text = (ROOT / "README.md").read_text()
    stale = text.replace("verifier errors and time-outs", "something else")
    assert stale != text
    assert tables.fill("README.md", stale) == text


def test_a_check_without_control_and_a_diverged_run_have_their_words(tables):
    assert tables.number(None, ".4f") == "diverged" and tables.number(0.5, "+.2f") == "+0.50"
    slope = {"scheme": "mup", "measure": "update", "name": "W_O", "value": -0.2, "limit": 0.15}
    record = {"slopes": [slope, slope | {"name": "W_Q", "value": 0.1}], "violations": []}
    assert tables.beyond(record) == "W_O"
    assert tables.beyond({"slopes": [], "violations": ["the control's steepest ..."]}) == "the control"


def test_missing_markers_are_an_error(tables):
    with pytest.raises(SystemExit, match="metrics"):
        tables.fill("README.md", "no markers here")


def test_speed_table_states_median_and_extremes(tables):
    def side(tokens: float) -> dict:
        three = {"min": 1.0, "median": 2.0, "max": 3.0}
        return {
            "tokens_per_s": {"min": tokens - 10, "median": tokens, "max": tokens + 10},
            "step_s": three,
            "generate_s": three,
            "peak_rss_mib": three,
        }

    record = {
        "date": "2026-01-02 03:04:05 +0000",
        "machine": {"cpu": "Some CPU"},
        "work": {"threads": 2},
        "runs": {"trl": [{"versions": {"trl": "1.0", "transformers": "5.0", "torch": "2.0"}}]},
        "summary": {
            "lit_reason": side(30_000.0),
            "trl": side(10_000.0),
            "ratio_tokens_per_s": {"min": 2.5, "median": 3.0, "max": 3.5},
            "ratio_peak_rss_mib": {"min": 0.5, "median": 0.6, "max": 0.7},
            "ratio_to_mixed_tokens_per_s": {"min": 3.5, "median": 4.0, "max": 4.25},
            "ratio_to_mixed_peak_rss_mib": {"min": 0.6, "median": 0.7, "max": 0.8},
            "ratio_to_defaults_tokens_per_s": {"min": 4.5, "median": 5.0, "max": 5.5},
            "ratio_to_defaults_peak_rss_mib": {"min": 0.8, "median": 0.9, "max": 1.0},
        },
    }
    table = tables.speed_table(record)
    assert "| completion tokens/s | 30,000 (29,990 to 30,010) | 10,000 (9,990 to 10,010) |" in table
    assert "**3.00 (2.50 to 3.50)**" in table
    assert "autocast): 4.00 (3.50 to 4.25), memory 0.70 (0.60 to 0.80);" in table
    assert "defaults: 5.00 (4.50 to 5.50), memory 0.90 (0.80 to 1.00);" in table
    assert "2026-01-02, Some CPU, 2 threads, TRL 1.0" in table
