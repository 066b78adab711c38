"""What the predictions behind a table show: paired tests between its methods, and its cells' intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedeat.evaluation.differences import LEVEL, Difference, compare_methods, corrected
from fedeat.evaluation.outcomes import Measure, Outcomes, outcomes, rate_over_seeds
from fedeat.evaluation.statistics import Interval
from fedeat.report.cells import Cell, Condition, Row, conditions, group, method_order
from fedeat.report.reading import Run

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparisons:
    """What was tested of one table, corrected over it.

    Attributes:
        differences: every two methods on every task and measure that could be paired.
        intervals: (method, task, measure) -> 95 % interval over seeds, of cells whose runs all have their predictions.
    """

    differences: tuple[Difference, ...] = ()
    intervals: Mapping[tuple[str, str, Measure], Interval] = field(default_factory=dict)

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
    columns: dict[tuple[str, Measure], dict[str, dict[int, Outcomes]]] = {}
    intervals: dict[tuple[str, str, Measure], Interval] = {}
    measures: tuple[Measure, ...] = ("accuracy", "asr")
    for task in dict.fromkeys(row.task for row in rows):
        for measure in measures:
            found = _outcomes(runs, condition, cells, task, measure)
            for method, seeds in found.items():
                pooled = rate_over_seeds(list(seeds.values()))
                if pooled is not None and len(seeds) == cells[method, task].accuracy.seeds > 1:
                    intervals[method, task, measure] = pooled
            columns[task, measure] = {
                method: found[method]
                for method in method_order(found)
                if measure == "accuracy" or not cells[method, task].flags
            }
    count = sum(len(found) * (len(found) - 1) // 2 for found in columns.values())
    # The smallest p-value of a bootstrap is 2 / (resamples + 1); it must be able to pass Holm's first step.
    resamples = max(_RESAMPLES, round(4 * count / LEVEL))
    tested = [
        item
        for (task, measure), found in columns.items()
        for item in compare_methods(found, task=task, measure=measure, resamples=resamples)
    ]
    return Comparisons(tuple(corrected(tested)), intervals)


def condition_costs(rows: Sequence[Row], runs: Sequence[Run]) -> list[tuple[Condition, str, Difference]]:
    """What a condition costs each method in accuracy: (the condition, the method, it less its reference).

    An attack's reference is the same partition without one; another partition's without an attack is the even one. On
    the same texts and seeds, corrected over all of them together.
    """
    found = conditions(rows)
    by = {condition: group(rows, condition) for condition in found}
    order = method_order(method for condition in found for method, _ in by[condition])
    measured = [(condition, reference) for condition in found if (reference := _reference(condition)) in by]
    measured = [(condition, reference) for condition, reference in measured if condition != reference]
    resamples = max(_RESAMPLES, round(4 * sum(len(by[condition]) for condition, _ in measured) / LEVEL))
    where: list[tuple[Condition, str]] = []
    tested: list[Difference] = []
    for task in dict.fromkeys(row.task for row in rows):
        done = {condition: _outcomes(runs, condition, by[condition], task, "accuracy") for condition in found}
        for condition, reference in measured:
            for method in (name for name in order if name in done[condition] and name in done[reference]):
                both = {condition.short: done[condition][method], reference.short: done[reference][method]}
                items = compare_methods(both, task=task, measure="accuracy", resamples=resamples)
                where += [(condition, method)] * len(items)
                tested += items
    return [(*place, item) for place, item in zip(where, corrected(tested), strict=True)]


def _reference(condition: Condition) -> Condition:
    return Condition("none", 0.0, condition.partition if condition.attack != "none" else "even")


def _outcomes(
    runs: Sequence[Run], condition: Condition, cells: Mapping[tuple[str, str], Cell], task: str, measure: Measure
) -> dict[str, dict[int, Outcomes]]:
    found: dict[str, dict[int, Outcomes]] = {}
    for run in runs:
        method = run.rows[0].method if run.rows else run.method
        if run.condition != condition or method == "base" or (method, task) not in cells or task not in run.predictions:
            continue
        try:
            found.setdefault(method, {})[run.seed or 0] = outcomes(run.predictions[task], measure)
        except (KeyError, TypeError, AttributeError):  # a foreign or damaged file: the rows stand, nothing is tested
            continue
    return {method: seeds for method, seeds in found.items() if all(item.texts for item in seeds.values())}
