"""What a run leaves for its reader: records, a picture of the curves, a self-contained page, a terminal panel."""

from lit_reason.report.metrics import METRICS, Metric, find_metric, markdown_table, out_of_range
from lit_reason.report.panel import panel
from lit_reason.report.picture import draw
from lit_reason.report.records import read_metrics
from lit_reason.report.write import write_report

__all__ = [
    "METRICS",
    "Metric",
    "draw",
    "find_metric",
    "markdown_table",
    "out_of_range",
    "panel",
    "read_metrics",
    "write_report",
]
