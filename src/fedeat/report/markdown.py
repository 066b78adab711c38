"""A comparison's tables and what they show, as Markdown for a page of results that is kept under version control."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence

from fedeat.evaluation.differences import Difference
from fedeat.report.cells import Cell, Condition, Row, display_name, method_order
from fedeat.report.claims import method_note, shows, shows_not
from fedeat.report.tables import FLAG, ResultTable, by_task, interval, percent, verdict

_MEASURES = ("accuracy", "ASR")


def condition_tables(tables: Sequence[ResultTable]) -> str:
    """The paper's tables, one a condition: methods down, tasks across, in percent.

    Accuracy and ASR stand side by side for up to two tasks and in a table each for more, which would not fit a screen.
    """
    parts = []
    for table in tables:
        texts = {method: [_texts(table, method, task) for task in table.tasks] for method in table.methods}
        if len(table.tasks) <= 2:
            head = ["method", *(f"{task} {measure}" for task in table.tasks for measure in _MEASURES)]
            lines = [[display_name(method), *itertools.chain(*cells)] for method, cells in texts.items()]
            grids = [grid(head, lines)]
        else:
            grids = [
                grid(
                    [measure, *table.tasks],
                    [[display_name(method), *(cell[which] for cell in cells)] for method, cells in texts.items()],
                )
                for which, measure in enumerate(_MEASURES)
            ]
        parts.append("\n\n".join([f"### {table.condition.title}", *grids, _below(table)]))
    return "\n\n".join(parts)


def task_tables(tables: Sequence[ResultTable]) -> str:
    """Two tables a task where there are many conditions, accuracy and ASR: conditions down, methods across."""
    parts = []
    for task, (shown, methods) in by_task(tables).items():
        texts = [[_texts(table, method, task) for method in methods] for table in shown]
        for which, measure in enumerate(_MEASURES):
            lines = [
                [table.condition.title, *(cell[which] for cell in cells)]
                for table, cells in zip(shown, texts, strict=True)
            ]
            parts.append(f"### {task}, {measure}\n\n{grid(['', *map(display_name, methods)], lines)}")
    notes = "\n\n".join(f"**{table.condition.title}.** {_below(table)}" for table in tables)
    return "\n\n".join([*parts, notes])


def cost_tables(costs: Sequence[tuple[Condition, str, Difference]]) -> str:
    """Accuracy under each condition less that of its reference, in points, a table a task; bold where it differs."""
    found = {(item.task, condition, method): item for condition, method, item in costs}
    parts = []
    for task in dict.fromkeys(item.task for _, _, item in costs):
        methods = method_order(method for own, _, method in found if own == task)
        lines = []
        for condition in dict.fromkeys(condition for own, condition, _ in found if own == task):
            cells = [found.get((task, condition, method)) for method in methods]
            lines.append([condition.title, *("" if item is None else _points(item) for item in cells)])
        parts.append(f"### {task}\n\n{grid(['', *map(display_name, methods)], lines)}")
    return "\n\n".join(parts)


def findings(tables: Sequence[ResultTable], rows: Sequence[Row]) -> str:
    """What the tests show and what they do not, sentence by sentence, and how they were made."""
    shown = shows(tables) or ["No difference between two methods."]
    parts = ["### Shown", _listed(shown), "### Not shown", _listed(shows_not(tables, rows)), method_note(tables)]
    return "\n\n".join(part for part in parts if part)


def paragraph(text: str) -> str:
    """Text in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def list_item(text: str) -> str:
    """The same, as a line of a list."""
    return textwrap.fill(
        text, 120, break_long_words=False, break_on_hyphens=False, initial_indent="- ", subsequent_indent="  "
    )


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table: what stands in the first column left, everything else right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in (head, rule, *lines))


def _texts(table: ResultTable, method: str, task: str) -> tuple[str, str]:
    """A cell's accuracy and ASR; its seeds where not all cells of the table have as many."""
    cell = table.cells.get((method, task))
    if cell is None:
        return "", ""
    sign = FLAG if cell.flags else ""
    accuracy = _bold(percent(cell.accuracy.mean), (method, task) in table.bold_accuracy)
    asr = _bold(percent(cell.asr.mean), (method, task) in table.bold_asr)
    count = cell.accuracy.seeds
    seeds = f", {count} seed{'s' * (count > 1)}" if len(_seeds([table])) > 1 and method != "base" else ""
    return (
        f"{accuracy}{sign} {interval(cell.accuracy)}{seeds}",
        f"{asr}{sign} {interval(cell.asr)} ({cell.broken}/{cell.benign_correct})".replace("  ", " "),
    )


def _below(table: ResultTable) -> str:
    """What stands under a table: its seeds, its tests, and its flags."""
    seeds = _seeds([table])
    count = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}" if seeds else "no"
    words = [f"{count} seed{'' if seeds == [1] else 's'} a cell."]
    if table.tested.differences:
        words.append(verdict(table))
    flags = "\n".join(f"- {FLAG} {method}: {text}." for method, text in table.footnotes)
    return "\n\n".join(filter(None, [" ".join(words), flags]))


def _seeds(tables: Iterable[ResultTable]) -> list[int]:
    """How many seeds the cells have, the base model's apart, which are evaluated once."""
    cells: list[Cell] = [cell for table in tables for (method, _), cell in table.cells.items() if method != "base"]
    return sorted({cell.accuracy.seeds for cell in cells})


def _points(item: Difference) -> str:
    value = _bold(f"{100 * item.value:+.1f}", item.significant)
    return f"{value} [{100 * item.low:+.1f}, {100 * item.high:+.1f}]"


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def _plain(text: str) -> str:
    """A cell's text: a bar in a name would begin a new cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
