"""Methods x partitions x attacks x fractions x seeds: every cell one run, side by side in processes (Tables 2-5).

A cell that is finished is not run again, so a comparison that was killed goes on where it stopped, and one that is
asked for more seeds, methods, attacks or fractions runs what is new.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedeat import evaluation, records
from fedeat.config import Config, to_toml, with_values
from fedeat.errors import ConfigError, FedeatError, RecordError
from fedeat.experiment import running
from fedeat.experiment.inputs import partition_name
from fedeat.experiment.side_by_side import Job, Tell, run_jobs

_log = logging.getLogger(__name__)

_AVERAGED = {"aggregation.rule": "mean", "aggregation.before": None, "aggregation.byzantine": None}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {"perturbation.kind": "none", **_AVERAGED},
    "eat": _AVERAGED,
    "gm": {"perturbation.kind": "none"},
    "fedeat": {},
}
"""The paper's ablation: what each method changes of a configuration that describes FedEAT."""

_MAY_GROW = frozenset({"methods", "attacks", "fractions", "seeds", "base", "processes"})
"""Keys of [compare] that say which cells run, and how many at once, but not what one is."""
_MAY_GAIN = ("variants", "partitions")
"""Tables of [compare] that a larger grid may add to; what a name stands for stays."""

CellProgress: TypeAlias = Callable[[str, str, int, int], None]
"""Called with a cell's name, what it is doing, how much is done, and of how much; first once with "", "planned", 0 and
the number of cells; a cell's last words are "finished" or "failed"."""


class CellsFailed(FedeatError):
    """Some cells of a comparison failed; the others have finished, and their rows are written."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        name: of its directory under runs/.
        config: what it runs.
    """

    name: str
    config: Config


def cells(config: Config) -> list[Cell]:
    """The grid of a comparison, methods fastest, seeds slowest: what is done early covers every method.

    Args:
        config: what all cells share, with its `[compare]` table.

    Raises:
        ConfigError: a cell's keys make no valid configuration, the shared ones do not describe FedEAT, or two cells
            would share a directory, or two partitions their name in the tables.
    """
    section = config.compare
    conditions = [("none", 0.0)] if 0.0 in section.fractions else []
    conditions += [(attack, f) for attack in section.attacks for f in section.fractions if f > 0 and attack != "none"]
    problems = _not_fedeat(config)
    grid = []
    partitions = section.partitions or {"": {}}
    called: dict[str, str] = {}
    for seed, split, (attack, fraction), method in itertools.product(
        section.seeds, partitions, conditions, section.methods
    ):
        changes = {
            "method": method,
            "seed": seed,
            "compare": {},
            "attack.kind": attack,
            "attack.fraction": fraction,
            "attack.scale": _scale(config, attack),
            **{f"partition.{key}": value for key, value in partitions[split].items()},
            **{**METHODS, **section.variants}[method],
        }
        name = "-".join(part for part in (method, split, attack, f"{fraction:g}", f"seed{seed}") if part)
        try:
            grid.append(Cell(name, with_values(config, changes)))
            called[split] = partition_name(grid[-1].config.partition)
        except ConfigError as error:
            where = f"{method}, {split}" if split else method
            problems += [f"{where}: {problem}" for problem in error.problems]
    problems += [
        f"more than one cell would be named {name}. Rename a variant or a partition."
        for name in _repeated(cell.name for cell in grid)
    ]
    problems += [
        f'more than one partition would be "{words}" in the tables, as if they were seeds of one. Compare them in '
        "directories of their own."
        for words in _repeated(called.values())
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), source="the comparison")
    return grid


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _scale(config: Config, attack: str) -> float | None:
    """An attack's scale, None for its own default; the one of [attack] is meant for the kind that stands beside it."""
    named = next((scale for name, scale in config.compare.scales.items() if name == attack), None)
    return config.attack.scale if named is None and attack == config.attack.kind else named


def _not_fedeat(config: Config) -> list[str]:
    """What a method's name would promise and the shared keys would not keep."""
    problems = []
    methods = config.compare.methods
    for method in methods:
        if method in ("eat", "fedeat") and config.perturbation.kind == "none":
            problems.append(f'{method} trains on perturbations, but perturbation.kind is "none". Set it to "pgd".')
        if method in ("gm", "fedeat") and config.aggregation.rule == "mean":
            problems.append(f'{method} needs a robust rule, but aggregation.rule is "mean". Set "geometric_median".')
    return problems


def compare(config: Config, directory: Path, *, progress: CellProgress | None = None) -> list[evaluation.Row]:
    """Runs every cell that is not finished and writes results.json, of these cells and of any others that lie there.

    Args:
        config: what to compare.
        directory: of the comparison; made where it does not exist. One that holds cells of a smaller grid keeps them.
        progress: told how each cell is getting on.

    Returns:
        The rows of all cells, and of the base model where `compare.base` asks for it.

    Raises:
        ConfigError: as `cells`.
        RecordError: the directory or one of its cells holds another comparison's, or another process is at it.
        CellsFailed: names each cell that failed with its reason, after all others have finished.
    """
    grid = cells(config)
    processes = config.compare.processes or _cores()
    threads = config.threads or max(1, _cores() // processes)
    tell: CellProgress = progress or (lambda cell, stage, done, total: None)
    with records.RunDirectory(directory):
        whole = _with_what_is_there(directory, config)
        jobs: list[Cell] = [*([Cell("base", grid[0].config)] if config.compare.base else []), *grid]
        places = {cell.name: directory / "runs" / cell.name for cell in jobs}
        # All that may refuse the command comes before anything is written.
        finished = {cell.name: rows for cell in jobs if (rows := _finished_rows(cell, places[cell.name])) is not None}
        kept = _rows_beside(directory, places.keys())
        records.write_text(directory / "config.toml", to_toml(whole))
        records.make_directory(directory / "runs")  # which tells a comparison from a run before any cell is finished
        records.write_json(directory / records.ENVIRONMENT, records.environment(threads))
        tell("", "planned", 0, len(jobs))
        waiting: dict[str, Job[list[evaluation.Row]]] = {}
        for cell in jobs:
            if cell.name in finished:
                tell(cell.name, "finished", 1, 1)
            else:
                waiting[cell.name] = functools.partial(_run_cell, cell, places[cell.name])
        failures: dict[str, str] = {}
        with contextlib.closing(run_jobs(waiting, processes=processes, threads=threads, tell=tell)) as outcomes:
            for name, outcome in outcomes:
                if outcome.value is not None:
                    finished[name] = outcome.value
                else:
                    failures[name] = outcome.failure
                    _log.warning("%s failed: %s", name, outcome.failure)
                tell(name, "failed" if name in failures else "finished", 1, 1)
        rows = [row for cell in jobs for row in _located(cell.name, finished.get(cell.name, []))]
        records.write_json(directory / "results.json", [*rows, *kept])
    if failures:
        listing = "".join(f"\n  - {cell.name}: {failures[cell.name]}" for cell in jobs if cell.name in failures)
        raise CellsFailed(
            f"{len(failures)} of {len(jobs)} cells failed; the others are in {directory / 'results.json'}. "
            f"Run the same command again to try them once more.{listing}"
        )
    return rows


def _finished_rows(cell: Cell, place: Path) -> list[evaluation.Row] | None:
    """The rows of a cell that ran before, None where it has not.

    Raises:
        RecordError: as `records.check`. Only the base model, which nothing trained, has no configuration there.
    """
    done = records.read_evaluation(place)
    if done is None:
        return None
    records.check(place, to_toml(cell.config))
    return list(done["rows"])


def _rows_beside(directory: Path, names: Collection[str]) -> list[evaluation.Row]:
    """Rows of finished cells under other names: results.json is of all that a directory holds, grid after grid."""
    places = sorted((directory / "runs").glob("*/evaluation.json"))
    others = [
        (file.parent.name, records.read_evaluation(file.parent)) for file in places if file.parent.name not in names
    ]
    return [row for name, found in others if found is not None for row in _located(name, found["rows"])]


def _located(name: str, rows: Iterable[evaluation.Row]) -> list[evaluation.Row]:
    return [{**row, "run": f"runs/{name}"} for row in rows]


def _with_what_is_there(directory: Path, config: Config) -> Config:
    """The configuration with the names of cells that the directory has already.

    Raises:
        RecordError: the directory is a run's, or its cells are another comparison's.
    """
    file = directory / "config.toml"
    if records.kind_of(directory) == "run":
        raise RecordError(
            f"{directory} holds a run, and a comparison needs a directory of its own. Choose another directory, or "
            "remove this one."
        )
    if file.is_file() and _is_settled(directory):
        before = records.read_config(file)
        known = {name: records.table(records.table(before, "compare"), name) for name in _MAY_GAIN}
        asked = config.compare.model_dump(mode="json", include=set(_MAY_GAIN))
        # Names of cells that are there already stay known, so that no later grid can give them another meaning.
        config = with_values(config, {f"compare.{name}": {**known[name], **asked[name]} for name in _MAY_GAIN})
        gained = {f"compare.{name}.{key}" for name in _MAY_GAIN for key in asked[name].keys() - known[name]}
        changes = records.changed_keys(_what_is_compared(before), _what_is_compared(tomllib.loads(to_toml(config))))
        if changes := [key for key in changes if key not in gained]:
            raise RecordError(
                f"{directory} holds another comparison, or a run{records.differing(changes)}. Choose another "
                "directory, or remove this one."
            )
    return config


def _is_settled(directory: Path) -> bool:
    """Whether a comparison's config.toml must stay: a cell got somewhere with it, or no comparison wrote it."""
    begun = (directory / records.ENVIRONMENT).is_file()
    return not begun or any(records.has_results(place) for place in (directory / "runs").glob("*"))


def _what_is_compared(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration without what may change between two commands and leave a cell's name its meaning."""
    return {**raw, "compare": {k: value for k, value in records.table(raw, "compare").items() if k not in _MAY_GROW}}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_cell(cell: Cell, directory: Path, tell: Tell) -> list[evaluation.Row]:
    if cell.name == "base":
        return running.evaluate_base(cell.config, directory, progress=tell)
    return running.run(cell.config, directory, progress=tell)
