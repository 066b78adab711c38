"""The report: the paper's tables and figures for a run or a comparison, from its records alone.

One self-contained HTML page that opens offline, each figure also as PNG, each table also as CSV, and the tables for
a terminal.
"""

from __future__ import annotations

from fedeat.report.figures import calibration_figure
from fedeat.report.page import differences_in, write_report, write_report_for
from fedeat.report.tables import print_tables
from fedeat.report.trade_offs import robustness_figure

__all__ = [
    "calibration_figure",
    "differences_in",
    "print_tables",
    "robustness_figure",
    "write_report",
    "write_report_for",
]
