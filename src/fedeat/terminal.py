"""What a person at a terminal sees: progress bars, notes, where things are. Results on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from fedeat.attacks.text import Attacked
    from fedeat.experiment.calibration import Calibration

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

_STAGES = {
    "train": "training clients",
    "rounds": "rounds on the nodes",
    "evaluate": "answering texts",
    "calibrate": "attacking batches",
    "attack": "attacking texts",
}
_TRAINING_SHARE = 0.9  # of a run's time, about; evaluation is the rest


@contextlib.contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars for one run, one a stage; yields what is told (stage, done, total)."""
    with _progress() as progress:
        shown: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                shown[stage] = progress.add_task(_STAGES.get(stage, stage), total=total, count="")
            progress.update(shown[stage], completed=done, total=total, count=f"{done}/{total}")

        yield tell


@contextlib.contextmanager
def grid_bars() -> Iterator[Callable[[str, str, int, int], None]]:
    """Bars for a comparison: the runs finished with the time left, and each run that is under way.

    Yields what is told (cell, stage, done, total), as `fedeat.experiment.comparison.CellProgress`.
    """
    with _progress() as progress:
        overall = progress.add_task("runs finished", total=None, count="")
        shown: dict[str, TaskID] = {}
        share: dict[str, float] = {}
        before: set[str] = set()
        planned = 0

        def tell(cell: str, stage: str, done: int, total: int) -> None:
            nonlocal planned
            if stage == "planned":
                planned = total
            elif stage in ("finished", "failed"):
                if cell not in shown:
                    before.add(cell)  # finished by an earlier command: it says nothing of the time left
                else:
                    progress.remove_task(shown.pop(cell))
                    share[cell] = 1.0
            else:
                if cell not in shown:
                    shown[cell] = progress.add_task(cell, total=total, count="")
                progress.update(
                    shown[cell],
                    description=f"{cell}: {_STAGES.get(stage, stage)}",
                    completed=done,
                    total=total,
                    count=f"{done}/{total}",
                )
                part = done / max(total, 1)
                is_training = stage == "train"
                share[cell] = _TRAINING_SHARE * part if is_training else 1 - (1 - _TRAINING_SHARE) * (1 - part)
            ended = len(before) + len(share) - len(shown)
            progress.update(
                overall, completed=sum(share.values()), total=planned - len(before), count=f"{ended}/{planned}"
            )

        yield tell


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        speed_estimate_period=300,
    )


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Shows what this package logs as notes on stderr, above any progress bar."""
    log, handler = logging.getLogger("fedeat"), _Notes()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        err.print(f"[yellow]{kind}:[/yellow] {escape(record.getMessage())}", highlight=False)


def show_note(message: str) -> None:
    """One line on what happened."""
    err.print(f"[bold]fedeat:[/bold] {escape(message)}", highlight=False)


def show_error(message: str) -> None:
    """One message on what went wrong."""
    err.print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False)


def show_places(places: Mapping[str, Path]) -> None:
    """Where things are, a line each."""
    width = max(map(len, places))
    for name, path in places.items():
        out.print(f"[bold]{name:>{width}}[/bold]  {escape(str(path))}", highlight=False)


def show_attack(attacked: Sequence[Attacked]) -> None:
    """What an attack on texts did, in a line or two."""
    from fedeat.attacks.adaptive_text import queries_per_success
    from fedeat.attacks.pairs import mean_rate

    changed = sum(found.modified != found.original for found in attacked)
    out.print(
        f"{changed} of {len(attacked)} texts changed, on average {100 * mean_rate(attacked):.1f} % of their words",
        highlight=False,
    )
    tried = [found for found in attacked if found.fell is not None]
    if not changed:
        text = "no text was changed, so the pairs and their attack success rate say nothing of the model."
        err.print(f"[yellow]warning:[/yellow] {text}", highlight=False)
    elif tried:
        fallen = sum(bool(found.fell) for found in tried)
        price = queries_per_success(attacked)
        cost = "" if price is None else f", {price:.0f} queries a success"
        out.print(
            f"attack success rate: {fallen}/{len(tried)} = {100 * fallen / len(tried):.1f} %{cost}", highlight=False
        )


def show_refusals(rates: Sequence[Mapping[str, Any]]) -> None:
    """Refusals by attack."""
    table = Table("attack", "radius", "refused", "95 %", "requests", "empty answers")
    for rate in rates:
        table.add_row(
            rate["attack"],
            f"{rate['radius']:g}" if rate["radius"] else "",
            f"{100 * rate['rate']:.1f} %",
            f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]",
            str(rate["requests"]),
            str(rate["empty"]),
        )
    out.print(table)


def show_curve(curve: Mapping[str, Any]) -> None:
    """Robust accuracy by task, radius and kind of attack."""
    table = Table("task", "radius", "attack", "robust accuracy", "95 %", "ASR", "broken / right")
    for point in curve["points"]:
        low, high = 100 * point["accuracy_low"], 100 * point["accuracy_high"]
        rate = "n/a" if point["asr"] is None else f"{100 * point['asr']:.1f} %"
        table.add_row(
            point["task"],
            f"{point['radius']:g}",
            point["kind"],
            f"{100 * point['accuracy']:.1f} %",
            f"[{low:.1f}, {high:.1f}]",
            rate,
            f"{point['broken']}/{point['right']}",
        )
    out.print(table)
    for note in curve["suspicions"]:
        err.print(f"[yellow]warning:[/yellow] {escape(note)}", highlight=False)


def show_calibration(found: Calibration) -> None:
    """The table of radii and the one recommended."""
    table = Table("radius", "clean loss", "adversarial loss", "random loss", "accuracy", "adversarial accuracy")
    for point in found.points:
        mark = " *" if point.radius == found.recommended else ""
        losses = (point.clean_loss, point.adversarial_loss, point.random_loss)
        table.add_row(
            f"{point.radius:g}{mark}",
            *(f"{loss:.3f}" for loss in losses),
            f"{100 * point.accuracy:.1f} %",
            f"{100 * point.adversarial_accuracy:.1f} %",
        )
    out.print(table)
    if found.points and found.points[0].accuracy <= found.chance:
        right, guessed = (f"{100 * share:.1f} %" for share in (found.points[0].accuracy, found.chance))
        out.print(
            f"The model is right on {right}; always giving the most frequent answer of a task is on {guessed}. It has "
            "nothing to lose, so no radius can be recommended. Calibrate a trained model, with --adapter."
        )
    elif found.recommended is None:
        out.print("No radius of the grid leaves half of the accuracy above chance. Try smaller ones with --radii.")
    else:
        out.print(f"recommended: perturbation.radius = {found.recommended:g} (*), from {found.examples} examples")
