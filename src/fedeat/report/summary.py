"""A paragraph in plain words on what the methods reach, made from the numbers and claiming no more than them.

Which differences are shown, and which are not, is said by `claims`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedeat.report.cells import display_name
from fedeat.report.tables import ResultTable, percent


def summarise(tables: Sequence[ResultTable], *, attack_free: bool = False) -> list[str]:
    """Sentences on the accuracies, and on which methods lose theirs to malicious clients.

    Args:
        tables: of the page.
        attack_free: leave out what attacks do, where it is tested and said from the tests.
    """
    if not tables:
        return ["Nothing has been evaluated yet."]
    free = {table.condition.partition: table for table in tables if table.condition.attack == "none"}
    sentences = []
    for table in tables:
        if table.condition.attack == "none":
            sentences += _attack_free(table)
        elif not attack_free:
            sentences += _under_attack(table, free.get(table.condition.partition))
    return sentences


def _attack_free(table: ResultTable) -> list[str]:
    tasks = _common(table.methods, table)
    means = {method: _mean_accuracy(table, method, tasks) for method in table.methods} if tasks else {}
    base = means.pop("base", None)
    if not means:
        alone = f"The base model alone answers {percent(base)} % correctly, {_over(tasks, table)}."
        return [alone] if base is not None else []
    parts = ", ".join(f"{display_name(method)} {percent(value)} %" for method, value in means.items())
    sentence = f"{_capital(table.condition.phrase)} the accuracy, {_over(tasks, table)}, is {parts}"
    return [sentence + (f"; the base model alone has {percent(base)} %." if base is not None else ".")]


def _under_attack(table: ResultTable, free: ResultTable | None) -> list[str]:
    methods = [method for method in table.methods if method != "base"]
    before = [method for method in methods if free is not None and method in free.methods]
    tasks = _common(methods, table)
    if free is not None:
        tasks = [task for task in tasks if task in _common(before, free)]
    if not tasks:
        return []
    lost, held, mixed = [], [], []
    for method in methods:
        value = percent(_mean_accuracy(table, method, tasks))
        if free is None or method not in before:
            mixed.append(f"{display_name(method)} has {value} % accuracy")
            continue
        fallen = [task for task in tasks if table.cells[method, task].accuracy.below(free.cells[method, task].accuracy)]
        change = f"from {percent(_mean_accuracy(free, method, tasks))} to {value} %"
        if len(fallen) == len(tasks):
            lost.append(f"{display_name(method)} ({change})")
        elif not fallen:
            held.append(f"{display_name(method)} ({change})")
        else:
            mixed.append(f"{display_name(method)} goes {change}, clearly worse on {listed(fallen)} only")
    parts = []
    if lost:
        parts.append(f"{listed(lost)} clearly {'loses' if len(lost) == 1 else 'lose'} accuracy on every task")
    if held:
        parts.append(f"for {listed(held)} no task shows a loss beyond its interval")
    return [f"{_capital(table.condition.phrase)} {'; '.join([*parts, *mixed])} ({_over(tasks, table)})."]


def _common(methods: Sequence[str], table: ResultTable) -> list[str]:
    """The tasks of which every one of these methods has an accuracy: means over others compare unlike things."""
    cells = table.cells
    return [
        task
        for task in table.tasks
        if all((method, task) in cells and cells[method, task].accuracy.mean is not None for method in methods)
    ]


def _mean_accuracy(table: ResultTable, method: str, tasks: Sequence[str]) -> float:
    return math.fsum(table.cells[method, task].accuracy.mean or 0.0 for task in tasks) / len(tasks)


def _over(tasks: Sequence[str], table: ResultTable) -> str:
    shared = " that all have" if len(tasks) < len(table.tasks) else ""
    if len(tasks) == 1:
        return f"on the one task{shared}" if shared else "on one task"
    return f"a mean over the {len(tasks)} tasks{shared}" if shared else f"a mean over {len(tasks)} tasks"


def listed(names: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
