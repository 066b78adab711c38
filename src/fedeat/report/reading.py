"""Reading of run and comparison directories, tolerant of everything a killed or running process can leave behind.

The report reads records alone (`config.toml`, `metrics.jsonl`, `evaluation.json`, ...). A piece that is missing or
half written becomes a note on the page, never an error; only a directory that holds no records at all is one.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedeat.errors import RecordError
from fedeat.records import table
from fedeat.report.cells import Condition, Row, read_rows, without_common_partition
from fedeat.report.values import Record, client_ids, number

RUN_FILES = ("metrics.jsonl", "evaluation.json")


@dataclass(frozen=True)
class Run:
    """What one run directory holds.

    Attributes:
        name: label of the run, unique on a page.
        config: the resolved configuration, {} when absent or unreadable.
        config_text: the TOML text as it stands in the file.
        environment: versions and machine, {} when absent.
        partition: examples by label name, one mapping a client id.
        left_out: rows of the data that no client trains on, by reason.
        rounds, clients, evaluations: the lines of `metrics.jsonl` of each kind, in file order.
        timings: the lines of `timings.jsonl`.
        rows: results of the evaluation, one a task.
        predictions: the answers these were computed from, by task.
        curve: robust accuracy along the radius, {} where it was not measured.
        refusals: how many harmful requests were refused, one record an attack.
        notes: what was missing or unreadable, in words.
    """

    name: str
    config: Record = field(default_factory=dict)
    config_text: str = ""
    environment: Record = field(default_factory=dict)
    partition: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    rounds: tuple[Record, ...] = ()
    clients: tuple[Record, ...] = ()
    evaluations: tuple[Record, ...] = ()
    timings: tuple[Record, ...] = ()
    rows: tuple[Row, ...] = ()
    predictions: Record = field(default_factory=dict)
    curve: Record = field(default_factory=dict)
    refusals: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """Method label, from the configuration or else the results."""
        label = self.config.get("method")
        return str(label) if label else (self.rows[0].method if self.rows else self.name)

    @property
    def attack(self) -> str:
        """Name of the attack by malicious clients, "none" without one."""
        if self.rows:
            return self.rows[0].attack
        section = table(self.config, "attack")
        return str(section.get("kind") or "none") if self.byzantine_fraction else "none"

    @property
    def byzantine_fraction(self) -> float:
        """Share of malicious clients, in 0..1."""
        if self.rows:
            return self.rows[0].byzantine_fraction
        return number(table(self.config, "attack").get("fraction")) or 0.0

    @property
    def condition(self) -> Condition:
        """The attack and the share of malicious clients."""
        return Condition.of(self.attack, self.byzantine_fraction, self.rows[0].partition if self.rows else "")

    @property
    def seed(self) -> int | None:
        """Seed of the run, None when it was not recorded."""
        value = number(self.config.get("seed"))
        if value is None:
            return self.rows[0].seed if self.rows else None
        return int(value)


@dataclass(frozen=True)
class Records:
    """Everything one page is made of: the rows of its tables and the runs behind them.

    Attributes:
        rows: of the tables.
        runs: the trainings behind them.
        config, config_text, environment: of the comparison, or of the one run.
        notes: what was missing or unreadable, in words.
        base: evaluations of the base model, which nothing trained.
        name: of the directory.
    """

    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    config: Record = field(default_factory=dict)
    config_text: str = ""
    environment: Record = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    base: tuple[Run, ...] = ()
    name: str = ""


def read_directory(directory: Path) -> Records:
    """The records of a comparison or run directory; a partition is named where there are several.

    Raises:
        RecordError: the directory does not exist, or is neither a comparison nor a run.
    """
    return _without_common_partition(read_records(directory))


def _without_common_partition(records: Records) -> Records:
    rows = without_common_partition(records.rows)
    if any(row.partition for row in rows if row.method != "base"):
        return records
    runs = tuple(replace(run, rows=tuple(replace(row, partition="") for row in run.rows)) for run in records.runs)
    return replace(records, rows=tuple(rows), runs=runs)


def read_records(directory: Path) -> Records:
    """The records of a comparison directory or of a single run directory, each naming its partition.

    Raises:
        RecordError: the directory does not exist, or is neither a comparison nor a run.
    """
    if not directory.is_dir():
        got = f"{directory} is a file" if directory.exists() else f"no directory at {directory}"
        raise RecordError(
            f"{got}; expected a run or comparison directory. "
            "Give the directory that `fedeat run` or `fedeat compare` wrote."
        )
    if (directory / "results.json").is_file() or (directory / "runs").is_dir():
        return _read_comparison(directory)
    if any((directory / name).is_file() for name in RUN_FILES):
        run = read_run(directory)
        return Records(run.rows, (run,), run.config, run.config_text, run.environment, run.notes)
    present = sorted(path.name for path in directory.iterdir())[:8]
    raise RecordError(
        f"{directory} is neither a comparison nor a run directory: expected results.json (a comparison) or "
        f"metrics.jsonl or evaluation.json (a run), got {', '.join(present) if present else 'an empty directory'}. "
        "Give the directory that `fedeat run` or `fedeat compare` wrote."
    )


def read_run(directory: Path, *, name: str | None = None) -> Run:
    """The records of one run directory; whatever is missing is noted in the result."""
    notes: list[str] = []
    if (directory / "evaluation.json").is_file() and not (directory / "config.toml").exists():
        return _read_evaluation_alone(directory, name or directory.resolve().name)
    config_text, config = _read_toml(directory / "config.toml", notes)
    lines = _read_lines(directory / "metrics.jsonl", notes)
    evaluation = _read_json(directory / "evaluation.json", notes, missing="not evaluated yet")
    rows, problems = read_rows(_stored_rows(evaluation))
    environment = _read_json(directory / "environment.json", notes)
    run = Run(
        name=name or directory.resolve().name,
        config=config,
        config_text=config_text,
        environment=environment if isinstance(environment, Mapping) else {},
        partition=_read_partition(directory / "partition.json", notes),
        rounds=_by_round(line for line in lines if line.get("kind") == "round"),
        clients=tuple(line for line in lines if line.get("kind") == "client"),
        evaluations=_by_round(line for line in lines if line.get("kind") == "evaluation"),
        timings=tuple(_read_lines(directory / "timings.jsonl", notes)),
        rows=tuple(rows),
        predictions=table(evaluation if isinstance(evaluation, Mapping) else {}, "predictions"),
        curve=table(evaluation if isinstance(evaluation, Mapping) else {}, "curve"),
        refusals=_refusals(evaluation),
        left_out=_left_out(directory / "partition.json"),
    )
    planned = number(table(config, "federation").get("rounds"))
    if planned is not None and len(run.rounds) < planned:
        notes.append(f"in progress or stopped: {len(run.rounds)} of {planned:.0f} rounds are recorded")
    return replace(run, notes=tuple(notes + problems))


def _read_evaluation_alone(directory: Path, name: str) -> Run:
    """A directory in which a model was evaluated and nothing was trained."""
    notes = ["an evaluation alone: there are no records of training"]
    evaluation = _read_json(directory / "evaluation.json", notes)
    rows, problems = read_rows(_stored_rows(evaluation), method=name)
    found = evaluation if isinstance(evaluation, Mapping) else {}
    return Run(
        name=name,
        rows=tuple(rows),
        predictions=table(found, "predictions"),
        curve=table(found, "curve"),
        refusals=_refusals(evaluation),
        notes=tuple(notes + problems),
    )


def _stored_rows(evaluation: object) -> list[object]:
    rows = evaluation.get("rows") if isinstance(evaluation, Mapping) else None
    return rows if isinstance(rows, list) else []


def _refusals(evaluation: object) -> tuple[Record, ...]:
    found = evaluation.get("refusals") if isinstance(evaluation, Mapping) else None
    return tuple(item for item in found if isinstance(item, Mapping)) if isinstance(found, list) else ()


def merge(parts: Sequence[Records]) -> Records:
    """Several directories on one page: federations of a task each make one table.

    Runs that share method, attack, seed and a task keep apart by their names.
    """
    runs = [run for part in parts for run in part.runs]
    if len({run.name for run in runs}) < len(runs):
        folders = [part.name for part in parts]
        known = all(folders) and len(set(folders)) == len(folders)
        prefixes = [part.name if known else str(place) for place, part in enumerate(parts, start=1) for _ in part.runs]
        runs = [replace(run, name=f"{prefix}-{run.name}") for prefix, run in zip(prefixes, runs, strict=True)]
    seen = Counter(key for run in runs for key in _results_of(run))
    rows = [row for part in parts if not part.runs for row in part.rows]
    of_base = [row for part in parts if part.runs for row in part.rows if row.method == "base"]
    bases: dict[tuple[str, int], Row] = {}
    for row in of_base:
        bases.setdefault((row.task, row.seed), replace(row, run=""))
    notes: list[str] = []
    if all(replace(row, run="") == bases[row.task, row.seed] for row in of_base):
        rows += bases.values()
    else:
        notes.append("the directories have different base models; the tables have none of them")
    kept = []
    for run in runs:
        if any(seen[key] > 1 for key in _results_of(run)):
            label = f"{run.method} ({run.name})"
            renamed = tuple(replace(row, method=f"{row.method} ({run.name})") for row in run.rows)
            kept.append(replace(run, config={**run.config, "method": label}, rows=renamed))
        else:
            kept.append(run)
        rows += kept[-1].rows
    for part in parts:
        single = part.runs[0].name if len(part.runs) == 1 else None
        notes += [f"{single}: {note}" if single else note for note in part.notes]
    first = parts[0]
    found = Records(
        rows=tuple(rows),
        runs=tuple(kept),
        config=first.config,
        config_text=first.config_text,
        environment=first.environment,
        notes=tuple(notes),
        base=tuple(run for part in parts for run in part.base),
    )
    return _without_common_partition(found)


def _results_of(run: Run) -> list[tuple[object, ...]]:
    """What a run's results are told apart by, once for each task it has some of."""
    return [(run.method, run.condition, run.seed, task) for task in ([row.task for row in run.rows] or [""])]


def _read_comparison(directory: Path) -> Records:
    notes: list[str] = []
    config_text, config = _read_toml(directory / "config.toml", notes)
    environment = _read_json(directory / "environment.json", notes)
    stored = _read_json(directory / "results.json", notes, missing="the comparison is not finished")
    folder = directory / "runs"
    cells = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [read_run(path, name=path.name) for path in cells]
    # The base model is evaluated, not trained: it has rows and no rounds.
    base = tuple(run for run in found if run.rows and all(row.method == "base" for row in run.rows))
    runs = tuple(run for run in found if run not in base)
    if isinstance(stored, list):
        rows, problems = read_rows(stored)
        notes += problems
        # A grid that grew, and was killed before its end, has runs that its list does not have yet.
        listed = {row.run for row in rows}
        later = [run for run in found if run.rows and listed and f"runs/{run.name}" not in listed]
        rows += [
            row for run in later if run in runs or not any(row.method == "base" for row in rows) for row in run.rows
        ]
        if later:
            notes.append(f"results.json does not have {_listing([run.name for run in later])}; the tables do")
    else:
        rows = [row for run in found for row in run.rows]
        if rows:
            notes.append("the tables hold the runs that are evaluated so far")
    grouped: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            grouped.setdefault(note, []).append(run.name)
    notes += [f"{_listing(names)}: {note}" for note, names in grouped.items()]
    return Records(
        rows=tuple(rows),
        runs=runs,
        config=config or (runs[0].config if runs else {}),
        config_text=config_text or (runs[0].config_text if runs else ""),
        environment=(environment if isinstance(environment, Mapping) else {}) or (runs[0].environment if runs else {}),
        notes=tuple(notes),
        base=base,
        name=directory.resolve().name,
    )


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more runs"


def _read_text(path: Path, notes: list[str], missing: str) -> str | None:
    try:
        # A kill may cut a multi-byte character in two; the rest of the file is still worth showing.
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"no {path.name}" + (f": {missing}" if missing else ""))
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
    return None


def _read_json(path: Path, notes: list[str], *, missing: str = "") -> Any:
    text = _read_text(path, notes, missing)
    return None if text is None else _parsed(text, json.loads, path, notes)


def _read_toml(path: Path, notes: list[str]) -> tuple[str, Record]:
    text = _read_text(path, notes, "") or ""
    return text, _parsed(text, tomllib.loads, path, notes) or {}


def _parsed(text: str, parse: Callable[[str], Any], path: Path, notes: list[str]) -> Any:
    try:
        return parse(text)
    except (ValueError, RecursionError):  # JSONDecodeError and TOMLDecodeError are ValueErrors
        notes.append(f"{path.name} is broken or half written and was left out")
        return None


def _read_lines(path: Path, notes: list[str]) -> list[Record]:
    """The objects of a JSON-lines file; lines that are no object are counted in one note."""
    text = _read_text(path, notes, "")
    lines = [line for line in (text or "").split("\n") if line.strip()]
    records: list[Record] = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            records.append(value)
    if len(records) < len(lines):
        count = len(lines) - len(records)
        notes.append(f"{path.name}: {count} unreadable line{'s' * (count > 1)} (a kill can leave half a line) left out")
    if text is not None and not records:
        notes.append(f"{path.name} holds no record yet")
    return records


def _by_round(lines: Iterable[Record]) -> tuple[Record, ...]:
    """Lines with a usable round number, in order of rounds; the last line of a round and task counts (resume)."""
    kept: dict[tuple[float, str], Record] = {}
    for line in lines:
        index = number(line.get("round"))
        if index is not None:
            kept[(index, str(line.get("task", "")))] = line
    return tuple(kept[key] for key in sorted(kept))


def _left_out(path: Path) -> dict[str, int]:
    stored = _read_json(path, [])
    counts = table(stored if isinstance(stored, Mapping) else {}, "left_out")
    return {str(reason): int(value) for reason, count in counts.items() if (value := number(count))}


def _read_partition(path: Path, notes: list[str]) -> dict[int, dict[str, float]]:
    stored = _read_json(path, notes)
    clients = stored.get("clients") if isinstance(stored, Mapping) else None
    partition: dict[int, dict[str, float]] = {}
    for key, value in clients.items() if isinstance(clients, Mapping) else ():
        counts = value.get("counts") if isinstance(value, Mapping) else None
        for client in client_ids([key]):
            pairs = counts.items() if isinstance(counts, Mapping) else ()
            partition[client] = {str(name): max(number(count) or 0.0, 0.0) for name, count in pairs}
    return dict(sorted(partition.items()))
