"""The HTML page: one file that opens offline, with every figure also as PNG and every table also as CSV beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fedeat.records import table
from fedeat.report.canvas import Canvas, write_file
from fedeat.report.cells import Condition, Row, attack_name, conditions, display_name, method_order
from fedeat.report.claims import losses, method_note, shows, shows_not
from fedeat.report.differences import Comparisons, compare_runs, condition_costs
from fedeat.report.listings import (
    backdoor_listing,
    clip,
    cost_listing,
    curve_csv,
    difference_listing,
    plain,
    refusal_listing,
    rejected_updates,
    result_listing,
    round_listing,
    table_view,
    task_views,
    timing_listing,
)
from fedeat.report.pictures import (
    partition_figures,
    result_figures,
    robustness_figures,
    round_figures,
    scatter_figures,
    weight_figures,
)
from fedeat.report.reading import Records, Run, merge, read_directory, read_records
from fedeat.report.round_figures import all_clients
from fedeat.report.summary import summarise
from fedeat.report.tables import FLAG, ResultTable, result_tables
from fedeat.report.turning_points import weakest_round


def write_report(directory: Path) -> Path:
    """Writes `report.html`, `figures/*.png` and `tables/*.csv` into a comparison or run directory.

    Pieces that are missing or half written become notes on the page.

    Returns:
        The path of the page.

    Raises:
        RecordError: the directory is missing, or neither a comparison nor a run.
    """
    return _write_page(read_directory(directory), directory / "report.html")


def write_report_for(directories: Sequence[Path], out: Path) -> Path:
    """Writes one page for several run or comparison directories.

    Args:
        directories: at least one; runs with equal method, attack and seed are told apart by directory name.
        out: the page if the name ends in `.html` or `.htm`, else the directory that gets `report.html`.

    Returns:
        The path of the page.

    Raises:
        ValueError: no directory was given.
        RecordError: a directory is missing, or neither a comparison nor a run.
    """
    if not directories:
        raise ValueError("no directory given; expected at least one run or comparison directory")
    page = out if out.suffix in (".html", ".htm") else out / "report.html"
    return _write_page(merge([read_records(directory) for directory in directories]), page)


def differences_in(directory: Path) -> dict[Condition, Comparisons]:
    """What the records of a comparison or run directory show of differences between methods, by condition.

    Raises:
        RecordError: as `write_report`.
    """
    records = read_directory(directory)
    return compare_runs(records.rows, records.runs)


def _write_page(records: Records, page: Path) -> Path:
    page.parent.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedeat.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["unbroken"] = _unbroken
    text = environment.get_template("page.html").render(_context(records, Canvas(page.parent)))
    # A lone surrogate from broken JSON has no UTF-8 form.
    write_file(page, text.encode("utf-8", errors="replace"))
    return page


def _context(records: Records, canvas: Canvas) -> dict[str, Any]:
    everyone = _everyone(records)
    order = _order(conditions(records.rows), everyone)
    runs = sorted(records.runs, key=order)
    tables = result_tables(records.rows, compare_runs(records.rows, runs))
    costs = condition_costs(records.rows, runs)
    figures = [
        *result_figures(tables, canvas, everyone),
        *scatter_figures(tables, canvas, everyone),
        *robustness_figures([*records.base, *runs], canvas, everyone),
        *round_figures(runs, canvas, everyone),
        *weight_figures(runs, canvas),
        *partition_figures(runs, canvas),
    ]
    return {
        "title": _title(records),
        "facts": _facts(records),
        "notes": records.notes,
        "summary": [*map(_unbroken, [*summarise(tables, attack_free=bool(costs)), *losses(costs)])],
        "shows": [*map(_unbroken, shows(tables))],
        "shows_not": [*map(_unbroken, _open(tables, records.rows, runs))],
        "method_note": _unbroken(method_note(tables)),
        "differences": difference_listing(tables, canvas),
        "by_task": task_views(tables, canvas),
        "tables": [table_view(result, canvas) for result in tables],
        "figures": [{**figure, "number": index} for index, figure in enumerate(figures, start=1)],
        "costs": cost_listing(costs, canvas),
        "backdoors": backdoor_listing(sorted(records.rows, key=order), canvas),
        "refusals": refusal_listing([*records.base, *runs], canvas),
        "curves": curve_csv([*records.base, *runs], canvas),
        "details": result_listing(records.rows, canvas),
        "rejected": rejected_updates(runs, canvas),
        "rounds": round_listing(runs, canvas),
        "timings": timing_listing(runs, canvas),
        "several_runs": len(runs) > 1,
        "config": records.config_text[:200_000],
        "environment": [(str(key), plain(value)) for key, value in records.environment.items()],
        "flag": FLAG,
    }


def _open(tables: Sequence[ResultTable], rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    """What a page does not show."""
    weakest = weakest_round(runs)
    return [*(shows_not(tables, rows) if tables else []), *([weakest] if weakest else [])]


def _unbroken(text: str) -> str:
    """The text with its percent signs kept beside their numbers."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _title(records: Records) -> str:
    methods = method_order([row.method for row in records.rows] or [run.method for run in records.runs])
    trained = [display_name(method) for method in methods if method != "base"] or [display_name(m) for m in methods]
    shown = trained if len(trained) <= 6 else [*trained[:5], f"{len(trained) - 5} more"]
    names = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "No runs yet"
    return f"{names} on {_model(records)}" if _model(records) else names


def _model(records: Records) -> str:
    for config in [*(run.config for run in records.runs), records.config]:
        section = config.get("model")
        known = section if isinstance(section, Mapping) else {"name": section}
        for value in (known.get(key) for key in ("name", "path", "base", "model")):
            if isinstance(value, str) and value.strip("/\\ "):
                # Of a local directory its name; of a hub model "owner/name" both.
                parts = [part for part in re.split(r"[/\\]", value.strip()) if part]
                local = value.strip().startswith(("/", ".", "~")) or len(parts) > 2 or "\\" in value
                return parts[-1] if local else "/".join(parts)
    return ""


def _facts(records: Records) -> list[tuple[str, str]]:
    """What was run, as (term, value) pairs: model, task kind, clients, rounds, attack, tasks, seeds."""
    configs = [run.config for run in records.runs] or [records.config]

    def settings(read: Callable[[Mapping[str, Any]], object]) -> str:
        return ", ".join(dict.fromkeys(plain(value) for config in configs if (value := read(config)) is not None))

    cohort = settings(lambda config: table(config, "federation").get("clients_per_round"))
    clients = ", ".join(dict.fromkeys(str(len(all_clients(run))) for run in records.runs if all_clients(run)))
    rounds = settings(lambda config: table(config, "federation").get("rounds"))
    rounds = rounds or ", ".join(dict.fromkeys(str(len(run.rounds)) for run in records.runs))
    seeds = sorted({run.seed for run in records.runs if run.seed is not None} | {row.seed for row in records.rows})
    under = [run.condition for run in records.runs]
    found = [*conditions(records.rows), *sorted(under, key=lambda item: item.attack != "none")]
    facts = [
        ("Model", _model(records)),
        ("Task kind", settings(lambda config: config.get("task"))),
        ("Tasks", ", ".join(dict.fromkeys(row.task for row in records.rows))),
        ("Clients", f"{clients} ({cohort} a round)" if cohort and cohort != clients else clients),
        ("Partition", settings(_partition)),
        ("Rounds", rounds),
        ("Malicious clients", _attacks(found)),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Runs", str(len(records.runs))),
    ]
    return [(term, clip(value)) for term, value in facts if value]


def _partition(config: Mapping[str, Any]) -> str | None:
    section = table(config, "partition")
    kind = section.get("kind")
    if kind == "dirichlet":
        return f"Dirichlet {plain(section.get('alpha', ''))} by {plain(section.get('by', ''))}"
    if kind == "quantity":
        return f"Dirichlet {plain(section.get('alpha', ''))} in amount"
    if kind == "task":
        return "one task a client"
    if kind == "column":
        return f"by {plain(section.get('by', ''))}"
    return None if kind is None else plain(kind)


def _everyone(records: Records) -> list[str]:
    """All methods in the order of the tables; those that were not evaluated last."""
    rows = [row for condition in conditions(records.rows) for row in records.rows if row.condition == condition]
    return method_order([row.method for row in [*rows, *records.rows]] + [run.method for run in records.runs])


def _order(shown: Sequence[Condition], everyone: Sequence[str]) -> Callable[[Run | Row], tuple[object, ...]]:
    """A sorting key: by condition as the tables stand, those without a table last; then by method and seed."""
    places = {condition: place for place, condition in enumerate(shown)}

    def key(item: Run | Row) -> tuple[object, ...]:
        condition = item.condition
        place = places.get(condition, len(places)), condition.attack != "none", condition.attack, condition.fraction
        name = item.name if isinstance(item, Run) else item.run
        return (*place, everyone.index(item.method), item.seed or 0, name)

    return key


def _attacks(found: Sequence[Condition]) -> str:
    """Such as "none; sign flip 10, 30 %; ALIE 30 %"."""
    shares: dict[str, list[str]] = {}
    for item in found:
        known = shares.setdefault(item.attack, [])
        if (share := f"{100 * item.fraction:g}") not in known:
            known.append(share)
    return "; ".join(
        "none" if attack == "none" else f"{attack_name(attack, inner=True)} {', '.join(known)} %"
        for attack, known in shares.items()
    )
