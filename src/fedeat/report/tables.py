"""The paper's result tables (Tables 2-5): methods down, tasks across, accuracy and ASR for each; one per condition.

The same table is rendered three ways: for the page, for a terminal, and as CSV in long form.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedeat.report.cells import (
    Cell,
    Condition,
    Estimate,
    Row,
    best_methods,
    conditions,
    display_name,
    group,
    method_order,
    read_rows,
    without_common_partition,
)
from fedeat.report.differences import Comparisons

FLAG = "†"
FEW = 3
"""More conditions than these are read side by side, a table a task, before each has a table of its own."""
_CSV_COLUMNS = (
    "method", "attack", "byzantine_fraction", "partition", "task", "seeds",
    "accuracy", "accuracy_low", "accuracy_high", "accuracy_deviation", "benign",
    "asr", "asr_low", "asr_high", "asr_deviation", "asr_seeds", "broken", "benign_correct", "pairs", "flags",
)  # fmt: skip


@dataclass(frozen=True)
class ResultTable:
    """One table: every method on every task under one condition.

    Attributes:
        number: position on the page, from 1.
        cells: by (method, task); a missing key was not measured.
        tested: which methods were compared, and what that showed.
        bold_accuracy, bold_asr: the (method, task) pairs printed bold.
    """

    number: int
    condition: Condition
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    tested: Comparisons
    bold_accuracy: frozenset[tuple[str, str]]
    bold_asr: frozenset[tuple[str, str]]

    def ordered(self) -> list[tuple[tuple[str, str], Cell]]:
        """The cells that were measured with their (method, task), methods slowest."""
        keys = [(method, task) for method in self.methods for task in self.tasks]
        return [(key, self.cells[key]) for key in keys if key in self.cells]

    @property
    def footnotes(self) -> list[tuple[str, str]]:
        """One (method, what was flagged on which tasks) for each method with a flag."""
        notes = []
        for method in self.methods:
            parts = [
                f"{task} ({'; '.join(cell.flags)})"
                for (name, task), cell in self.ordered()
                if name == method and cell.flags
            ]
            if parts:
                notes.append((display_name(method), ", ".join(parts)))
        return notes


def result_tables(rows: Sequence[Row], tested: Mapping[Condition, Comparisons] | None = None) -> list[ResultTable]:
    """The tables of all conditions, the attack-free one first; without tests nothing is bold."""
    tables = []
    for number, condition in enumerate(conditions(rows), start=1):
        found = (tested or {}).get(condition, Comparisons())
        cells = group(rows, condition, found.intervals)
        methods = method_order(method for method, _ in cells)
        tasks = tuple(task for task in dict.fromkeys(row.task for row in rows) if any(key[1] == task for key in cells))
        accuracy, asr = set(), set()
        for task in tasks:
            best_accuracy, best_asr = best_methods(
                {m: cells[m, task] for m in methods if (m, task) in cells},
                accuracy=found.shown(task, "accuracy"),
                asr=found.shown(task, "asr"),
            )
            accuracy |= {(method, task) for method in best_accuracy}
            asr |= {(method, task) for method in best_asr}
        bold = frozenset(accuracy), frozenset(asr)
        tables.append(ResultTable(number, condition, tuple(methods), tasks, cells, found, *bold))
    return tables


def by_task(tables: Sequence[ResultTable]) -> dict[str, tuple[list[ResultTable], list[str]]]:
    """For each task the tables that have cells of it, and the methods that have one there, both in their order."""
    return {
        task: (
            [table for table in tables if task in table.tasks],
            method_order(method for table in tables for method, own in table.cells if own == task),
        )
        for task in dict.fromkeys(task for table in tables for task in table.tasks)
    }


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage without its sign, "n/a" when unknown."""
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def interval(value: Estimate) -> str:
    """Such as "[81.0, 91.5]" in percent, "" when unknown."""
    return "" if value.low is None or value.high is None else f"[{percent(value.low)}, {percent(value.high)}]"


def spread(value: Estimate) -> str:
    """Such as "±1.2" (standard deviation over seeds, in points), "" for a single seed."""
    return "" if value.deviation is None else f"±{percent(value.deviation)}"


def print_tables(
    rows: Sequence[Mapping[str, Any] | Row],
    console: Console,
    tested: Mapping[Condition, Comparisons] | None = None,
) -> None:
    """Prints the tables of all conditions, in percent, split by tasks where the terminal is narrow.

    Under each value stand its spread over seeds, where there are several, and for ASR the counts broken/right on the
    original. Bold is what is shown to be better than another method; flagged cells carry a sign and a footnote and are
    never bold.
    """
    known, notes = read_rows(rows)
    for result in result_tables(without_common_partition(known), tested):
        names = max(len(display_name(method)) for method in result.methods)
        per_line = max(1, (console.width - min(names, 30) - 2) // 17)
        for start in range(0, len(result.tasks), per_line):
            more = " (continued)" if start else ""
            console.print(Text(f"Table {result.number}. {result.condition.title}{more}", style="bold"))
            console.print(_terminal_table(result, result.tasks[start : start + per_line]))
        if result.tested.differences:
            console.print(Text(verdict(result), style="dim"))
        for method, text in result.footnotes:
            console.print(Text(f"{FLAG} {method}: {text}", style="yellow"))
        console.print()
    for note in notes:
        console.print(Text(note, style="yellow"))
    if not known:
        console.print(Text("No results yet."))
    else:
        text = f"In percent; under ASR the pairs broken/right on the original. {FLAG}: flagged"
        console.print(Text(text, style="dim"))


def verdict(result: ResultTable) -> str:
    """One sentence on how many of a table's differences are shown."""
    count, shown = len(result.tested.differences), sum(item.significant for item in result.tested.differences)
    if not shown:
        return f"No difference shown in {count} comparison{'s' * (count > 1)} of two methods."
    return f"{shown} of {count} comparisons of two methods show a difference; of the rest none is shown."


def table_csv(tables: Sequence[ResultTable], task: str | None = None) -> str:
    """Tables in long form, one line a condition, method and task, shares in 0..1; of one task or of all."""
    lines: list[Sequence[object]] = []
    for result in tables:
        for (method, name), cell in result.ordered():
            if task not in (None, name):
                continue
            accuracy, asr = cell.accuracy, cell.asr
            lines.append(
                (
                    method, result.condition.attack, result.condition.fraction, result.condition.partition, name,
                    accuracy.seeds,
                    accuracy.mean, accuracy.low, accuracy.high, accuracy.deviation, cell.benign,
                    asr.mean, asr.low, asr.high, asr.deviation, asr.seeds, cell.broken, cell.benign_correct, cell.pairs,
                    "; ".join(cell.flags),
                )
            )  # fmt: skip
    return write_csv(_CSV_COLUMNS, lines)


def write_csv(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """CSV text; a cell that a spreadsheet would run as a formula gets a leading apostrophe."""

    def safe(value: object) -> object:
        # Rejection reasons and names can come from another machine.
        return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([safe("" if value is None else value) for value in line] for line in lines)
    return buffer.getvalue()


def _terminal_table(result: ResultTable, tasks: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(Text("\nmethod"), max_width=30, overflow="ellipsis")
    for task in tasks:
        table.add_column(Text(f"{task}\nacc. ↑"), justify="right")
        table.add_column(Text("\nASR ↓"), justify="right")
    for method in result.methods:
        line: list[Text] = [Text(display_name(method))]
        for task in tasks:
            cell = result.cells.get((method, task))
            if cell is None:
                line += [Text(""), Text("")]
                continue
            sign = FLAG if cell.flags else ""
            for value, bold, counts in (
                (cell.accuracy, (method, task) in result.bold_accuracy, ""),
                (cell.asr, (method, task) in result.bold_asr, f"{cell.broken}/{cell.benign_correct}"),
            ):
                text = Text(percent(value.mean) + sign, style="bold" if bold else "dim" if sign else "")
                for small in (spread(value), counts):
                    text += Text(f"\n{small}", style="dim") if small else Text("")
                line.append(text)
        table.add_row(*line)
    return table
