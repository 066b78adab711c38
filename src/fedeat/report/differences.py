"""Which differences between methods the records show: paired tests on the predictions behind a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedeat.evaluation.differences import LEVEL, Difference, Outcomes, compare_methods, corrected, outcomes
from fedeat.report.cells import Cell, Condition, Row, conditions, group, method_order
from fedeat.report.reading import Run

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparisons:
    """What was tested of one table, corrected over it.

    Attributes:
        differences: every two methods on every task and measure that could be paired.
    """

    differences: tuple[Difference, ...] = ()

    def of(self, task: str, measure: str) -> list[Difference]:
        """Those of one column."""
        return [item for item in self.differences if (item.task, item.measure) == (task, measure)]

    def shown(self, task: str, measure: str) -> list[tuple[str, str]]:
        """(better, worse) of one column's differences that are shown."""
        return [
            (item.better, item.second if item.better == item.first else item.first)
            for item in self.of(task, measure)
            if item.better is not None
        ]


def compare_runs(rows: Sequence[Row], runs: Sequence[Run]) -> dict[Condition, Comparisons]:
    """The tests of each condition's table.

    The base model does not compete. A flagged method is not compared in attack success, where its rate says nothing.

    Args:
        rows: of the tables.
        runs: with the predictions behind the rows; runs without take no part.
    """
    return {condition: _test_table(rows, runs, condition) for condition in conditions(rows)}


def _test_table(rows: Sequence[Row], runs: Sequence[Run], condition: Condition) -> Comparisons:
    cells = group(rows, condition)
    tasks = list(dict.fromkeys(row.task for row in rows))
    columns: list[tuple[str, Any, dict[str, dict[int, Outcomes]]]] = []
    for task in tasks:
        for measure in ("accuracy", "asr"):
            found = _outcomes(runs, condition, cells, task, measure)
            columns.append((task, measure, {method: found[method] for method in method_order(found)}))
    count = sum(len(found) * (len(found) - 1) // 2 for _, _, found in columns)
    # The smallest p-value of a bootstrap is 2 / (resamples + 1); it must be able to pass Holm's first step.
    resamples = max(_RESAMPLES, round(4 * count / LEVEL))
    tested = [
        item
        for task, measure, found in columns
        for item in compare_methods(found, task=task, measure=measure, resamples=resamples)
    ]
    return Comparisons(tuple(corrected(tested)))


def _outcomes(
    runs: Sequence[Run], condition: Condition, cells: Mapping[tuple[str, str], Cell], task: str, measure: Any
) -> dict[str, dict[int, Outcomes]]:
    found: dict[str, dict[int, Outcomes]] = {}
    for run in runs:
        method = run.rows[0].method if run.rows else run.method
        cell = cells.get((method, task))
        if run.condition != condition or method == "base" or cell is None or task not in run.predictions:
            continue
        if measure == "asr" and cell.flags:
            continue
        try:
            found.setdefault(method, {})[run.seed or 0] = outcomes(run.predictions[task], measure)
        except (KeyError, TypeError, AttributeError):  # a foreign or damaged file: the rows stand, nothing is tested
            continue
    return {method: seeds for method, seeds in found.items() if all(item.texts for item in seeds.values())}
