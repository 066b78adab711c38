"""A study of `advglue` seed by seed: which of two methods has the lower accuracy, and who gives one answer to all.

A mean over few seeds hides whether all of them say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import fmean

from fedeat.report import markdown
from fedeat.report.cells import Row, conditions, display_name, method_order
from fedeat.report.reading import Records

PAIRS = (("eat", "fedavg"), ("fedeat", "gm"), ("gm", "fedavg"), ("fedeat", "eat"))
"""The first differs from the second by adversarial training, or by the median."""

_ABOUT = (
    "In how many seeds the first of two methods has the lower accuracy, and how many points above the second it is on "
    "average; those of the first two columns differ by adversarial training, those of the next two by the median. Then "
    "how many runs of each method end with one answer to everything, or to all pairs."
)


def section(records: Records) -> str:
    """The table, "" where no pair of methods was run under the same condition."""
    methods = [name for name in method_order(row.method for row in records.rows) if name != "base"]
    tasks = sorted({row.task for row in records.rows if row.method != "base"})
    lines = []
    for condition in conditions(records.rows):
        for task in tasks:
            rows = [row for row in records.rows if (row.condition, row.task) == (condition, task)]
            by = {name: {row.seed: row for row in rows if row.method == name} for name in methods}
            compared = [_compared(by.get(first, {}), by.get(second, {})) for first, second in PAIRS]
            if any(compared):
                where = condition.title if len(tasks) == 1 else f"{condition.title}; {task}"
                lines.append([where, *compared, *(_one_answer(by[name].values()) for name in methods)])
    if not lines:
        return ""
    head = [
        "",
        *(f"{display_name(first)} below {display_name(second)}" for first, second in PAIRS),
        *(f"one answer, {display_name(name)}" for name in methods),
    ]
    return f"{markdown.paragraph(_ABOUT)}\n\n{markdown.grid(head, lines)}"


def _compared(first: Mapping[int, Row], second: Mapping[int, Row]) -> str:
    """Such as "5 of 5, -11.0"."""
    away = [
        100 * (own - other)
        for seed in first.keys() & second.keys()
        if (own := first[seed].accuracy) is not None and (other := second[seed].accuracy) is not None
    ]
    return f"{sum(points < 0 for points in away)} of {len(away)}, {fmean(away):+.1f}" if away else ""


def _one_answer(rows: Collection[Row]) -> str:
    return f"{sum(any('constant' in flag for flag in row.flags) for row in rows)} of {len(rows)}" if rows else ""
