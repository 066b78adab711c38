"""The tables of a page, ready for its template, and each as a CSV file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fedeat.evaluation.differences import Difference
from fedeat.report.canvas import Canvas
from fedeat.report.cells import Condition, Row, display_name, estimate, method_order
from fedeat.report.reading import Run
from fedeat.report.round_figures import malicious_clients, rejections
from fedeat.report.tables import FEW, ResultTable, by_task, interval, percent, spread, table_csv, write_csv
from fedeat.report.trade_offs import curve_points
from fedeat.report.turning_points import spreads
from fedeat.report.values import Record, client_ids, count, number, share

# What stands on the page; all of it is in the CSV files.
_SHOWN_LINES = 200
_TEXT_LIMIT = 300


def task_views(tables: Sequence[ResultTable], canvas: Canvas) -> list[dict[str, Any]]:
    """A table a task where there are many conditions: these down, methods across."""
    if len(tables) <= FEW:
        return []
    return [
        {
            "task": task,
            "methods": [display_name(method) for method in methods],
            "lines": [
                (result.condition.title, [_cell_view(result, method, task) for method in methods]) for result in shown
            ],
            "csv": canvas.csv(table_csv(tables, task), f"conditions-{task}"),
        }
        for task, (shown, methods) in by_task(tables).items()
    ]


def table_view(result: ResultTable, canvas: Canvas) -> dict[str, Any]:
    """One condition's table: methods down, tasks across."""
    return {
        "number": result.number,
        "title": result.condition.title,
        "tasks": result.tasks,
        "lines": [
            (display_name(method), [_cell_view(result, method, task) for task in result.tasks])
            for method in result.methods
        ],
        "footnotes": result.footnotes,
        "bold": bool(result.bold_accuracy or result.bold_asr),
        "verdicts": [_verdict(result, task) for task in result.tasks] if result.tested.differences else [],
        "seeds": _seeds(result),
        "csv": canvas.csv(table_csv([result]), f"table-{result.number}-{result.condition.short}"),
    }


def _seeds(result: ResultTable) -> str:
    """How many seeds the cells are means over, the base model's apart, such as "1 to 5"; "" for one."""
    counts = sorted({cell.accuracy.seeds for (method, _), cell in result.cells.items() if method != "base"})
    if not counts or counts[-1] <= 1:
        return ""
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _cell_view(result: ResultTable, method: str, task: str) -> dict[str, Any] | None:
    key = method, task
    cell = result.cells.get(key)
    if cell is None:
        return None
    return {
        "flags": cell.flags,
        "accuracy": percent(cell.accuracy.mean),
        "accuracy_spread": spread(cell.accuracy),
        "accuracy_interval": interval(cell.accuracy),
        "benign": cell.benign,
        "accuracy_bold": key in result.bold_accuracy,
        "asr": percent(cell.asr.mean),
        "asr_spread": spread(cell.asr),
        "asr_interval": interval(cell.asr),
        "counts": f"{cell.broken}/{cell.benign_correct}",
        "asr_bold": key in result.bold_asr,
    }


def _verdict(result: ResultTable, task: str) -> list[tuple[str, str]]:
    """Under a task's accuracy and its ASR: whether a difference is shown, and how small a one could have been."""
    found = []
    for measure in ("accuracy", "asr"):
        items = result.tested.of(task, measure)
        count = sum(item.significant for item in items)
        words = "" if not items else f"{count} of {len(items)} shown" if count else "none shown"
        smallest = _smallest(items) if items else ""
        found.append((words, smallest))
    return found


def _smallest(items: Sequence[Difference]) -> str:
    """Such as "from 2.4": the points that half of the comparisons, of those that could show any, could have shown."""
    able = [item.detectable for item in items if item.detectable < 1]
    return f"from {percent(statistics.median(able))}" if able else "none"


def difference_listing(tables: Sequence[ResultTable], canvas: Canvas) -> dict[str, Any]:
    """Every comparison of two methods with its tests; those shown first."""
    columns = (
        "attack", "byzantine_fraction", "partition", "task", "measure", "first", "second", "difference", "low", "high",
        "first_votes", "second_votes", "mcnemar_p", "bootstrap_p", "holm_p", "shown", "detectable", "seeds",
        "originals",
    )  # fmt: skip
    items = sorted(
        ((table, item) for table in tables for item in table.tested.differences),
        key=lambda pair: not pair[1].significant,
    )
    lines = [
        (
            table.condition.attack, table.condition.fraction, table.condition.partition, item.task, item.measure,
            item.first, item.second, item.value, item.low, item.high, item.first_votes, item.second_votes,
            item.mcnemar, item.bootstrap, item.adjusted, "yes" if item.significant else "no", item.detectable,
            item.seeds, item.originals,
        )
        for table, item in items
    ]  # fmt: skip
    shown = [
        {
            "condition": table.condition.title, "task": item.task,
            "measure": "ASR" if item.measure == "asr" else "accuracy",
            "methods": f"{display_name(item.first)} less {display_name(item.second)}",
            "value": f"{100 * item.value:+.1f}", "interval": f"[{100 * item.low:+.1f}, {100 * item.high:+.1f}]",
            "votes": f"{item.first_votes} : {item.second_votes}", "mcnemar": _p(item.mcnemar),
            "bootstrap": _p(item.bootstrap), "adjusted": _p(item.adjusted), "significant": item.significant,
            "detectable": percent(item.detectable) if item.detectable < 1 else "none",
        }
        for table, item in items[:_SHOWN_LINES]
    ]  # fmt: skip
    return {
        "csv": canvas.csv(write_csv(columns, lines), "differences") if lines else "",
        "lines": shown,
        "hidden": max(len(lines) - _SHOWN_LINES, 0),
        "several": len(tables) > 1,
    }


def cost_listing(costs: Sequence[tuple[Condition, str, Difference]], canvas: Canvas) -> dict[str, Any]:
    """What each condition costs each method in accuracy, a column a task."""
    columns = (
        "attack", "byzantine_fraction", "partition", "method", "task", "difference", "low", "high", "mcnemar_p",
        "bootstrap_p", "holm_p", "shown", "detectable", "seeds", "originals",
    )  # fmt: skip
    lines = [
        (
            condition.attack, condition.fraction, condition.partition, method, item.task, item.value,
            item.low, item.high, item.mcnemar, item.bootstrap, item.adjusted,
            "yes" if item.significant else "no", item.detectable, item.seeds, item.originals,
        )
        for condition, method, item in costs
    ]  # fmt: skip
    tasks = list(dict.fromkeys(item.task for _, _, item in costs))
    found = {(condition, method, item.task): item for condition, method, item in costs}
    shown = []
    for condition in dict.fromkeys(condition for condition, _, _ in costs):
        for method in method_order(method for known, method, _ in costs if known == condition):
            items = [found.get((condition, method, task)) for task in tasks]
            cells = [
                None
                if item is None
                else (f"{100 * item.value:+.1f}", f"[{100 * item.low:+.1f}, {100 * item.high:+.1f}]", item.significant)
                for item in items
            ]
            shown.append((condition.title, display_name(method), cells))
    return {
        "csv": canvas.csv(write_csv(columns, lines), "costs") if lines else "",
        "tasks": tasks,
        "lines": shown[:_SHOWN_LINES],
        "count": len(lines),
        "smallest": [_smallest([item for _, _, item in costs if item.task == task]) for task in tasks],
    }


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def backdoor_listing(rows: Sequence[Row], canvas: Canvas) -> dict[str, Any]:
    """How often a backdoor's trigger calls up its answer, with and without the trigger, beside clean accuracy."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.backdoor is not None:
            found.setdefault((row.condition.title, row.method, row.task), []).append(row)
    columns = (
        "condition", "method", "task", "seeds", "texts", "success", "success_low", "success_high", "without_trigger",
        "accuracy",
    )  # fmt: skip
    lines: list[tuple[object, ...]] = []
    shown = []
    for (condition, method, task), members in found.items():
        success = estimate([(row.backdoor, row.backdoor_low, row.backdoor_high) for row in members])
        clean = estimate([(row.backdoor_clean, None, None) for row in members])
        accuracy = estimate([(row.accuracy, None, None) for row in members])
        texts = sum(row.backdoor_texts for row in members)
        lines.append(
            (
                condition, method, task, len(members), texts, success.mean, success.low, success.high, clean.mean,
                accuracy.mean,
            )
        )  # fmt: skip
        shown.append(
            (
                condition, display_name(method), task, percent(success.mean), interval(success), percent(clean.mean),
                percent(accuracy.mean), texts,
            )
        )  # fmt: skip
    return {"csv": canvas.csv(write_csv(columns, lines), "backdoors") if lines else "", "lines": shown}


def refusal_listing(runs: Sequence[Run], canvas: Canvas) -> dict[str, Any]:
    """How many harmful requests each method refuses, as they are, misspelt and attacked at each radius: columns."""
    found: dict[tuple[str, str, str, float], list[Record]] = {}
    for run in runs:
        where = "" if run.method == "base" else run.condition.title
        for item in run.refusals:
            found.setdefault(
                (where, run.method, str(item.get("attack")), number(item.get("radius")) or 0.0), []
            ).append(item)
    columns = ("condition", "method", "attack", "radius", "seeds", "requests", "refused", "low", "high", "empty")
    lines: list[tuple[object, ...]] = []
    kinds: dict[str, None] = {}
    table: dict[tuple[str, str], dict[str, tuple[str, str, str]]] = {}
    for (condition, method, attack, radius), members in found.items():
        rate = estimate([(share(m.get("rate")), share(m.get("low")), share(m.get("high"))) for m in members])
        requests, empty = (sum(count(m.get(name)) for m in members) for name in ("requests", "empty"))
        lines.append((condition, method, attack, radius, len(members), requests, rate.mean, rate.low, rate.high, empty))
        words = {"none": "As they are", "typos": "Misspelt", "embedding": f"Radius {radius:g}"}
        kind = words.get(attack, attack)
        kinds.setdefault(kind)
        silent = f", {empty} empty" if empty else ""
        cell = percent(rate.mean), interval(rate), f"n = {requests}{silent}"
        table.setdefault((condition, display_name(method)), {})[kind] = cell
    order = {condition: place for place, condition in enumerate(dict.fromkeys(condition for condition, _ in table))}
    shown = [
        (condition, method, [cells.get(kind) for kind in kinds])
        for (condition, method), cells in sorted(table.items(), key=lambda entry: order[entry[0][0]])
    ]
    return {
        "csv": canvas.csv(write_csv(columns, lines), "refusals") if lines else "",
        "kinds": list(kinds),
        "lines": shown[:_SHOWN_LINES],
    }


def curve_csv(runs: Sequence[Run], canvas: Canvas) -> str:
    """Every point of every robustness curve as CSV; the file's path, "" where there is none."""
    columns = ("run", "method", "seed", "task", "kind", "radius", "accuracy", "accuracy_low", "accuracy_high")
    lines = [
        (run.name, run.method, run.seed, *(point[key] for key in columns[3:]))
        for run in runs
        for point in curve_points(run)
    ]
    return canvas.csv(write_csv(columns, lines), "robustness") if lines else ""


def rejected_updates(runs: Sequence[Run], canvas: Canvas) -> dict[str, Any]:
    """Rejected updates by run, client and reason, with the rounds they happened in."""
    found: dict[tuple[str, str, str, bool], list[int]] = {}
    for run in runs:
        malicious = set(malicious_clients(run))
        for line in run.rounds:
            for entry in rejections(line):
                client = entry.get("client")
                known = bool(malicious & set(client_ids([client])))
                key = (run.name, clip(plain(client)), str(entry.get("reason")), known)
                found.setdefault(key, []).append(int(line["round"]))
    columns = ("run", "client", "malicious", "reason", "count", "rounds")
    lines = [
        (run, client, "yes" if known else "no", reason, len(rounds), " ".join(map(str, rounds)))
        for (run, client, reason, known), rounds in found.items()
    ]
    total = sum(len(client_ids(line.get("cohort"))) for run in runs for line in run.rounds)
    return {
        "csv": canvas.csv(write_csv(columns, lines), "rejected") if lines else "",
        "lines": [
            (run, client, known, clip(reason), count, _ranges([int(part) for part in rounds.split()]))
            for run, client, known, reason, count, rounds in lines[:_SHOWN_LINES]
        ],
        "hidden": max(len(lines) - _SHOWN_LINES, 0),
        "count": sum(len(rounds) for rounds in found.values()),
        "updates": total,
    }


def round_listing(runs: Sequence[Run], canvas: Canvas) -> dict[str, Any]:
    """Every round of every run; shown on the page for a single run, as CSV always."""
    private = any("epsilon" in line for run in runs for line in run.rounds)
    columns = (
        *("run", "round", "cohort", "accepted", "rejected", "iterations", "gap", "loss", "update_norm", "spread"),
        *(("epsilon",) if private else ()),
    )
    apart = {run.name: spreads(run) for run in runs}
    lines = [
        (
            run.name, int(line["round"]), len(client_ids(line.get("cohort"))), len(client_ids(line.get("accepted"))),
            len(rejections(line)), number(line.get("iterations")), number(line.get("gap")), number(line.get("loss")),
            number(line.get("update_norm")), apart[run.name].get(int(line["round"])),
            *((number(line.get("epsilon")),) if private else ()),
        )
        for run in runs
        for line in run.rounds
    ]  # fmt: skip
    shown = lines[:_SHOWN_LINES] if len(runs) == 1 else []
    return {
        "csv": canvas.csv(write_csv(columns, lines), "rounds") if lines else "",
        "columns": columns[1:],
        "lines": [[_short(value) for value in line[1:]] for line in shown],
        "hidden": len(lines) - len(shown) if len(runs) == 1 else 0,
    }


def timing_listing(runs: Sequence[Run], canvas: Canvas) -> dict[str, Any]:
    lines = []
    for run in runs:
        seconds = [value for line in run.timings if (value := number(line.get("seconds"))) is not None]
        memory = [value for line in run.timings if (value := number(line.get("peak_memory_bytes"))) is not None]
        if seconds:
            peak = max(memory) / 2**20 if memory else None
            lines.append((run.name, len(seconds), sum(seconds), statistics.median(seconds), peak))
    columns = ("run", "rounds", "seconds", "median_seconds_per_round", "peak_memory_mib")
    return {
        "csv": canvas.csv(write_csv(columns, lines), "timings") if lines else "",
        "lines": [
            (name, count, f"{total:.1f}", f"{median:.2f}", "n/a" if peak is None else f"{peak:,.0f}")
            for name, count, total, median, peak in lines[:_SHOWN_LINES]
        ],
    }


def result_listing(rows: Sequence[Row], canvas: Canvas) -> dict[str, Any]:
    """Every row with its histogram and counts."""
    order = {method: index for index, method in enumerate(method_order(row.method for row in rows))}
    ordered = sorted(
        rows, key=lambda row: (row.condition.attack != "none", row.condition.short, order[row.method], row.seed)
    )
    columns = (
        "method", "attack", "byzantine_fraction", "partition", "task", "seed", "accuracy", "asr", "accuracy_original",
        "accuracy_modified", "pairs", "originals", "benign_correct", "broken", "unparsable", "histogram", "flags",
        "run",
    )  # fmt: skip
    lines = []
    for row in ordered:
        histogram = ", ".join(f"{name} {count}" for name, count in row.histogram)
        values = {name: getattr(row, name) for name in columns}
        lines.append(tuple({**values, "histogram": histogram, "flags": "; ".join(row.flags)}.values()))
    shown = [
        {
            "method": display_name(row.method), "condition": row.condition.title, "task": row.task, "seed": row.seed,
            "original": percent(row.accuracy_original), "modified": percent(row.accuracy_modified), "pairs": row.pairs,
            "originals": row.originals, "unparsable": percent(row.unparsable), "flags": row.flags,
            "histogram": clip(", ".join(f"{name} {count}" for name, count in row.histogram if count)),
        }
        for row in ordered[:_SHOWN_LINES]
    ]  # fmt: skip
    return {
        "csv": canvas.csv(write_csv(columns, lines), "results") if lines else "",
        "lines": shown,
        "hidden": max(len(lines) - _SHOWN_LINES, 0),
    }


def plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def clip(text: str) -> str:
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"


def _ranges(values: Sequence[int]) -> str:
    """Such as "0-3, 5"."""
    parts: list[list[int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return clip(", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts))


def _short(value: object) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
