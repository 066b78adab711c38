"""A paragraph in plain words, made from the numbers and claiming no more than their intervals."""

from __future__ import annotations

from collections.abc import Sequence

from fedeat.report.cells import Row, display_name
from fedeat.report.tables import ResultTable, percent, result_tables


def summarise(rows: Sequence[Row]) -> list[str]:
    """Sentences on what collapsed, what stayed, which differences are shown, what is flagged, and how sure all is."""
    tables = result_tables(rows)
    if not tables:
        return ["Nothing has been evaluated yet."]
    free = next((table for table in tables if table.condition.attack == "none"), None)
    sentences = []
    if free is not None:
        sentences += _attack_free(free)
    for table in tables:
        if table is not free:
            sentences += _under_attack(table, free)
    return sentences + _success_rates(tables) + _flagged(tables) + _precision(rows)


def _attack_free(table: ResultTable) -> list[str]:
    means = {method: _mean_accuracy(table, method) for method in table.methods}
    trained = {method: value for method, value in means.items() if method != "base" and value is not None}
    base = means.get("base")
    if not trained:
        alone = f"The base model alone answers {percent(base)} % correctly, {_over(table)}."
        return [alone] if base is not None else []
    parts = ", ".join(f"{display_name(method)} {percent(value)} %" for method, value in trained.items())
    sentence = f"Without malicious clients the accuracy, {_over(table)}, is {parts}"
    return [sentence + (f"; the base model alone has {percent(base)} %." if base is not None else ".")]


def _under_attack(table: ResultTable, free: ResultTable | None) -> list[str]:
    lost, held, mixed = [], [], []
    for method in table.methods:
        value = _mean_accuracy(table, method)
        if method == "base" or value is None:
            continue
        before = _mean_accuracy(free, method) if free is not None else None
        if free is None or before is None:
            mixed.append(f"{display_name(method)} has {percent(value)} % accuracy")
            continue
        shared = [task for task in table.tasks if (method, task) in table.cells and (method, task) in free.cells]
        fallen = [
            task for task in shared if table.cells[method, task].accuracy.below(free.cells[method, task].accuracy)
        ]
        change = f"from {percent(before)} to {percent(value)} %"
        if shared and len(fallen) == len(shared):
            lost.append(f"{display_name(method)} ({change})")
        elif not fallen:
            held.append(f"{display_name(method)} ({change})")
        else:
            mixed.append(f"{display_name(method)} goes {change}, clearly worse on {_listed(fallen)} only")
    parts = []
    if lost:
        parts.append(f"{_listed(lost)} clearly {'loses' if len(lost) == 1 else 'lose'} accuracy on every task")
    if held:
        parts.append(f"for {_listed(held)} no task shows a loss beyond its interval")
    parts += mixed
    if not parts:
        return []
    basis = "one task" if len(table.tasks) == 1 else f"means over {len(table.tasks)} tasks"
    return [f"{_capital(table.condition.phrase)} {'; '.join(parts)} ({basis})."]


def _success_rates(tables: Sequence[ResultTable]) -> list[str]:
    """Which ASR lie apart from the reference method's; flagged cells and cells of lost accuracy make no claim.

    The reference is the first method, in the paper's order, with the most sound cells: FedAvg, or where malicious
    clients broke it, the next that stands.
    """
    claims: list[str] = []
    compared = found = 0
    for table in tables:
        sound = {method: _sound_tasks(table, method) for method in table.methods if method != "base"}
        if not sound:
            continue
        reference = max(sound, key=lambda method: len(sound[method]))
        apart: dict[tuple[str, str], list[str]] = {}
        for method, tasks in sound.items():
            for task in tasks if method != reference else ():
                if task not in sound[reference]:
                    continue
                compared += 1
                ours, theirs = table.cells[method, task].asr, table.cells[reference, task].asr
                if ours.below(theirs) or theirs.below(ours):
                    apart.setdefault((method, "lower" if ours.below(theirs) else "higher"), []).append(task)
        where = f" {table.condition.phrase}" if table.condition.attack != "none" else ""
        claims += [
            f"{display_name(method)} is {direction} than {display_name(reference)} on {_listed(tasks)}{where}"
            for (method, direction), tasks in apart.items()
        ]
        found += sum(len(tasks) for tasks in apart.values())
    if not compared:
        return []
    if not claims:
        return [
            "No difference in attack success rate between methods of comparable accuracy is shown: in "
            f"{'the one comparison' if compared == 1 else f'all {compared} comparisons'} the 95 % intervals overlap, "
            "which is not evidence that the rates are equal."
        ]
    rest = "In no comparison do" if found == compared else f"In {compared - found} of {compared} comparisons"
    return [
        f"In attack success rate {'; '.join(claims)}. {rest} the 95 % intervals overlap"
        + ("." if found == compared else ", and no difference is shown.")
    ]


def _sound_tasks(table: ResultTable, method: str) -> list[str]:
    """Tasks on which the method is unflagged, has an ASR with an interval, and is not clearly below the best."""
    tasks = []
    for task in table.tasks:
        cell = table.cells.get((method, task))
        if cell is None or cell.flags or cell.asr.low is None or cell.asr.high is None:
            continue
        column = [table.cells[other, task] for other in table.methods if (other, task) in table.cells]
        if not any(cell.accuracy.below(other.accuracy) for other in column if not other.flags):
            tasks.append(task)
    return tasks


def _flagged(tables: Sequence[ResultTable]) -> list[str]:
    methods: dict[str, int] = {}
    for table in tables:
        for (method, _), cell in table.cells.items():
            if cell.flags and not (method == "base" and table is not tables[0]):
                methods[method] = methods.get(method, 0) + 1
    if not methods:
        return []
    total = sum(methods.values())
    names = _listed([f"{count} of {display_name(method)}" for method, count in methods.items()])
    return [
        f"{total} cell{' is' if total == 1 else 's are'} flagged ({names}) and compared with nothing "
        "in attack success: a model that always answers the same, or no better than by guessing, is not robust."
    ]


def _precision(rows: Sequence[Row]) -> list[str]:
    halves = sorted(
        (row.asr_high - row.asr_low) / 2 for row in rows if row.asr_low is not None and row.asr_high is not None
    )
    if not halves:
        return []
    counts = [row.benign_correct for row in rows if row.asr is not None]
    span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    seeds = len({row.seed for row in rows})
    return [
        f"Each attack success rate rests on {span} pairs that the model has right on the original, and its 95 % "
        f"interval typically reaches {percent(halves[len(halves) // 2], 0)} points to either side; "
        + (
            f"{seeds} seeds were run."
            if seeds > 1
            else "one seed was run, so the spread between training runs is not measured."
        )
    ]


def _mean_accuracy(table: ResultTable, method: str) -> float | None:
    values = [table.cells[method, task].accuracy.mean for task in table.tasks if (method, task) in table.cells]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _over(table: ResultTable) -> str:
    return "on one task" if len(table.tasks) == 1 else f"a mean over {len(table.tasks)} tasks"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
