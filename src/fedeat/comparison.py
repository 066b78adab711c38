"""Methods x attacks x fractions x seeds: every cell one run, side by side in processes, one table (Tables 2-5).

A cell that is finished is not run again, so a comparison that was killed goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fedeat import evaluation, experiment, records
from fedeat.config import Config, to_toml, with_values
from fedeat.errors import FedeatError, RecordError

METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {"perturbation.kind": "none", "aggregation.rule": "mean"},
    "eat": {"aggregation.rule": "mean"},
    "gm": {"perturbation.kind": "none"},
    "fedeat": {},
}
"""The paper's ablation: what each method changes of a configuration that describes FedEAT."""

CellProgress: TypeAlias = Callable[[str, str, int, int], None]
"""Called with a cell's name, what it is doing, how much is done, and of how much; first once with "", "planned", 0 and
the number of cells."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        name: of its directory under runs/.
        config: what it runs.
    """

    name: str
    config: Config


def cells(config: Config, *, threads: int) -> list[Cell]:
    """The grid of a comparison, methods fastest.

    Args:
        config: what all cells share, with its `[compare]` table.
        threads: of each cell.

    Raises:
        ConfigError: a variant's keys make no valid configuration.
    """
    section = config.compare
    conditions = [("none", 0.0)] if 0.0 in section.fractions else []
    conditions += [(attack, f) for attack in section.attacks for f in section.fractions if f > 0 and attack != "none"]
    grid = []
    for seed in section.seeds:
        for attack, fraction in conditions:
            for method in section.methods:
                changes = {**METHODS, **section.variants}[method]
                common = {"method": method, "seed": seed, "threads": threads, "compare": {}}
                under = {"attack.kind": attack, "attack.fraction": fraction}
                name = f"{method}-{attack}-{fraction:g}-seed{seed}"
                grid.append(Cell(name, with_values(config, {**common, **under, **changes})))
    return grid


def compare(config: Config, directory: Path, *, progress: CellProgress | None = None) -> list[evaluation.Row]:
    """Runs every cell that is not finished and writes results.json.

    Args:
        config: what to compare.
        directory: of the comparison; made where it does not exist.
        progress: told how each cell is getting on.

    Returns:
        The rows of all cells, and of the base model where `compare.base` asks for it.

    Raises:
        RecordError: the directory holds another comparison.
        FedeatError: cells failed; names each with its reason, after all others have finished.
    """
    processes = config.compare.processes
    threads = config.threads or max(1, (os.cpu_count() or 1) // processes)
    grid = cells(config, threads=threads)
    tell: CellProgress = progress or (lambda cell, stage, done, total: None)
    directory.mkdir(parents=True, exist_ok=True)
    _claim(directory, to_toml(config))
    records.write_json(directory / "environment.json", records.environment(threads))
    jobs: list[Cell] = [*([Cell("base", grid[0].config)] if config.compare.base else []), *grid]
    tell("", "planned", 0, len(jobs))
    finished: dict[str, list[evaluation.Row]] = {}
    for cell in jobs:
        done = records.read_evaluation(directory / "runs" / cell.name)
        if done is not None:
            finished[cell.name] = done["rows"]
            tell(cell.name, "finished", 1, 1)
    failures: dict[str, str] = {}
    waiting = [cell for cell in jobs if cell.name not in finished]
    if waiting:
        _run_side_by_side(waiting, directory, processes, threads, tell, finished, failures)
    rows = [{**row, "run": f"runs/{cell.name}"} for cell in jobs for row in finished.get(cell.name, [])]
    records.write_json(directory / "results.json", rows)
    if failures:
        listing = "".join(f"\n  - {name}: {reason}" for name, reason in failures.items())
        raise FedeatError(
            f"{len(failures)} of {len(jobs)} cells failed; the others are in {directory / 'results.json'}. "
            f"Run the same command again to try them once more.{listing}"
        )
    return rows


def _claim(directory: Path, config_toml: str) -> None:
    file = directory / "config.toml"
    if file.is_file() and file.read_text() != config_toml:
        raise RecordError(
            f"{directory} holds another comparison, or a run. Choose another directory, or remove this one."
        )
    records.write_text(file, config_toml)


def _run_side_by_side(
    waiting: list[Cell],
    directory: Path,
    processes: int,
    threads: int,
    tell: CellProgress,
    finished: dict[str, list[evaluation.Row]],
    failures: dict[str, str],
) -> None:
    # Fresh interpreters: a fork would copy torch's thread pools in whatever state they are.
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    with ProcessPoolExecutor(
        min(processes, len(waiting)), mp_context=context, initializer=_start_process, initargs=(events, threads)
    ) as pool:
        running: dict[Future[list[evaluation.Row]], Cell] = {
            pool.submit(_run_cell, cell, directory / "runs" / cell.name): cell for cell in waiting
        }
        try:
            while running:
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(events, tell)
                for future in done:
                    cell = running.pop(future)
                    error = future.exception()
                    if error is None:
                        finished[cell.name] = future.result()
                    else:
                        failures[cell.name] = " ".join(str(error).split()) or type(error).__name__
                    tell(cell.name, "finished" if error is None else "failed", 1, 1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _drain(events: Any, tell: CellProgress) -> None:
    while True:
        try:
            tell(*events.get_nowait())
        except queue.Empty:
            return


_events: Any = None  # of a cell's process, set once when it starts


def _start_process(events: Any, threads: int) -> None:
    global _events
    _events = events
    torch.set_num_threads(threads)


def _run_cell(cell: Cell, directory: Path) -> list[evaluation.Row]:
    def progress(stage: str, done: int, total: int) -> None:
        _events.put((cell.name, stage, done, total))

    if cell.name == "base":
        return experiment.evaluate_base(cell.config, directory, progress=progress)
    return experiment.run(cell.config, directory, progress=progress)
