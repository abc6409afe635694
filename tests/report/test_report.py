"""The table of metric names, the picture's arithmetic, the page and the panel."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from lit_reason.errors import ConfigError, DataError
from lit_reason.report import (
    METRICS,
    draw,
    find_metric,
    markdown_table,
    out_of_range,
    panel,
    read_metrics,
    write_report,
)
from lit_reason.report.metrics import ALL_METRICS
from lit_reason.report.picture import rolling_mean, rolling_se, standard_errors
from lit_reason.report.records import append_row, begin_file, read_rows, write_rows

RECORDS = [
    {"step": s, "reward/answer/mean": s / 10, "reward/answer/se": 0.1, "kl/k1": 0.01 * s, "entropy": 0.5}
    for s in range(10)
]


def test_headline_names_are_few_and_final():
    names = [m.name for m in METRICS]
    assert len(names) == len(set(names)) <= 25
    assert {"reward/<name>/mean", "ratio/q99", "mismatch/kl", "speed/sync_s", "lr/<role>", "reward/faults"} <= set(
        names
    )
    assert markdown_table().count("\n") == len(ALL_METRICS) + 1


def test_find_metric():
    assert find_metric("reward/answer/mean").name == "reward/<name>/mean"
    assert find_metric("lr/hidden").name == "lr/<role>"
    assert find_metric("reward/faults").name == "reward/faults"
    with pytest.raises(ConfigError, match="did you mean 'entropy'"):
        find_metric("entropi")


def test_out_of_range_marks_what_left_its_bounds():
    record = {
        "entropy": 0.001,
        "expert/dead": 0.0,
        "reward/faults": 3.0,
        "loss": float("nan"),
        "mine": 1e9,
        "kl/k1": 0.1,
    }
    assert set(out_of_range(record)) == {"entropy", "reward/faults", "loss"}


def test_rolling_mean_and_its_error_by_hand():
    values = np.array([1.0, 2.0, 6.0, 8.0])
    assert rolling_mean(values, 2).tolist() == [1.0, 1.5, 4.0, 7.0]
    errors = np.array([3.0, 4.0, 12.0, 5.0])
    # sqrt(3^2 + 4^2) / 2, sqrt(4^2 + 12^2) / 2, sqrt(12^2 + 5^2) / 2
    assert rolling_se(errors, 2) == pytest.approx([3.0, 2.5, 160**0.5 / 2, 6.5])


def test_band_survives_a_step_without_an_error():
    records = [
        {"step": 0, "r/mean": 1.0},
        {"step": 1, "r/mean": 1.0, "r/se": 0.2},
        {"step": 2},
        {"step": 3, "r/mean": 2.0},
    ]
    assert standard_errors(records, "r/mean").tolist() == [0.2, 0.2, 0.2]
    assert standard_errors(records, "other/mean") is None


def test_picture_draws_the_data(tmp_path):
    # pixels of the reward's colour rise from left to right
    from matplotlib.image import imread

    path = draw(RECORDS, tmp_path / "deep" / "curves.png", title="t")
    image = imread(path)[..., :3]
    ys, xs = np.nonzero(np.abs(image - np.array([0x00, 0x72, 0xB2]) / 255).max(-1) < 0.02)
    main = xs < image.shape[1] * 0.6
    # the lowest pixel of the colour: the legend is above the curve
    early, late = ys[main & (xs < 0.2 * image.shape[1])].max(), ys[main & (xs > 0.55 * image.shape[1])].max()
    assert late < early - 0.3 * image.shape[0]
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(DataError, match="0 records"):
        draw([], tmp_path / "x.png")


def test_report_is_one_file_without_links(tmp_path):
    write_rows(tmp_path / "metrics" / "steps.jsonl", RECORDS)
    (tmp_path / "config.yaml").write_text("model: <script>alert(1)</script>\n")
    (tmp_path / "summary.json").write_text('{"pass_at_1_before": 0.4, "verdict": "better"}')
    png, page = write_report(tmp_path)
    text = page.read_text()
    assert png.exists() and "<script>" not in text and "&lt;script&gt;" in text
    assert re.findall(r'(?:src|href)="(?!data:)', text) == [] and "data:image/png;base64," in text
    assert "pass_at_1_before" in text and "better" in text
    # first tenth 0, last tenth 0.9
    row = re.search(r"<tr><td[^>]*>reward/answer/mean</td>(.*?)</tr>", text).group(1)
    assert re.findall(r'"n">([^<]+)<', row) == ["0", "0.9", "0.9"]


def test_page_marks_what_left_its_range(tmp_path):
    _, page = write_report(tmp_path, records=[{"step": 0, "reward/faults": 2.0, "entropy": 1.0}])
    assert re.findall(r'<tr class="check"><td[^>]*>([^<]+)', page.read_text()) == ["reward/faults"]


def test_panel_shows_first_and_last_tenth():
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(panel([*RECORDS[:-1], {**RECORDS[-1], "entropy": 0.0}]))
    text = console.export_text()
    assert re.search(r"reward/answer/mean +0\.000 +0\.900", text) and "check entropy" in text and "10 steps" in text


def test_metrics_come_from_a_csv_logger_too(tmp_path):
    csv = tmp_path / "csv" / "version_0" / "metrics.csv"
    csv.parent.mkdir(parents=True)
    csv.write_text("step,loss,val\n0,1.5,\n0,,7\n1,1.25,\n")
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 1.5, "val": 7.0}, {"step": 1, "loss": 1.25}]
    with pytest.raises(DataError, match="is it a run directory"):
        read_metrics(csv.parent.parent / "nowhere")


def test_a_torn_last_line_is_dropped_and_resume_repairs_the_file(tmp_path):
    path = tmp_path / "steps.jsonl"
    for step in range(4):
        append_row(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_rows(path)] == [0, 1, 2, 3]
    begin_file(path, 3)
    append_row(path, {"step": 3})
    assert [r["step"] for r in read_rows(path)] == [0, 1, 2, 3]
    path.write_text('{"step": 0}\n{torn\n{"step": 1}\n')
    with pytest.raises(DataError, match=r"steps\.jsonl:2 is not JSON"):
        read_rows(path)
