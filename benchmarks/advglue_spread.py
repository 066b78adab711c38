"""How far apart honest updates are in a study of `advglue`, and what a minority could make of it.

Lengths of updates are on record for every client and round; where the aggregate is their plain mean, its length gives
how far they lie from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from fedeat.aggregation import resting_place, turning_share
from fedeat.report import markdown
from fedeat.report.reading import Records, Run
from fedeat.report.tables import percent

_SPREAD = (
    "Root mean square distance of a round's updates from their mean, over that mean's length, without malicious "
    "clients: a mean over the rounds of each seed, then over seeds, in brackets the least and the most of a seed; then "
    "in how many seeds that of EAT is larger. Last, the share of attackers of one mind that [turns a median of such "
    "updates around](../aggregation.md#bounded-is-not-unmoved), in the first round and in the last, means over seeds."
)
_FIRST_STEP = (
    "The same formula tells what attackers of one mind leave of the median's first step: as a share of the mean's "
    "without attack, from that run's spread and the number of the malicious; beside it the length that the adaptive "
    "attack left. Means over seeds, in brackets the least and the most."
)


def section(records: Records) -> str:
    """How far apart the clients' updates are, with adversarial training and without, where all are honest."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in records.runs:
        averaged = run.config.get("aggregation", {}).get("rule") == "mean" and run.condition.attack == "none"
        if averaged and run.rows and run.seed is not None:
            found.setdefault(run.rows[0].task, {}).setdefault(run.rows[0].method, {})[run.seed] = spreads(run)
    lines = []
    for task, own in found.items():
        plain, trained = own.get("fedavg", {}), own.get("eat", {})
        shared = sorted(plain.keys() & trained.keys())
        if shared:
            cells = [_spread_cells([by[seed] for seed in shared]) for by in (plain, trained)]
            more = sum(fmean(trained[seed]) > fmean(plain[seed]) for seed in shared)
            lines.append([task, cells[0][0], cells[1][0], f"{more} of {len(shared)}", cells[0][1], cells[1][1]])
    if not lines:
        return ""
    head = ["", "FedAvg", "EAT", "EAT farther apart", "FedAvg, turned from", "EAT, turned from"]
    parts = [markdown.paragraph(_SPREAD), markdown.grid(head, lines)]
    steps = _first_steps(records)
    if steps:
        parts += [markdown.paragraph(_FIRST_STEP), markdown.grid(["", "by the formula", "measured"], steps)]
    return "\n\n".join(parts)


def spreads(run: Run) -> list[float]:
    """Each round's root mean square distance of its updates from their mean, over the mean's length.

    Args:
        run: of which each round's aggregate is the plain mean of its clients' updates.
    """
    squares: dict[int, list[float]] = {}
    for line in run.clients:
        squares.setdefault(int(line["round"]), []).append(float(line["update_norm"]) ** 2)
    lengths = {int(line["round"]): float(line["update_norm"]) for line in run.rounds}
    return [
        math.sqrt(max(fmean(found) - lengths[number] ** 2, 0.0)) / lengths[number]
        for number, found in sorted(squares.items())
    ]


def _first_steps(records: Records) -> list[list[str]]:
    """What attackers who know the rule leave of the median's first step, a line a task."""
    found: dict[str, list[tuple[float, float]]] = {}
    calm = {
        (run.rows[0].task, run.seed): run
        for run in records.runs
        if run.rows and run.method == "fedavg" and run.condition.attack == "none"
    }
    for run in records.runs:
        undisturbed = calm.get((run.rows[0].task, run.seed)) if run.rows else None
        if undisturbed is None or (run.method, run.condition.attack) != ("gm", "adaptive"):
            continue
        first = run.rounds[0]
        told = resting_place(len(first["malicious"]) / len(first["cohort"]), spreads(undisturbed)[0])
        seen = float(first["update_norm"]) / float(undisturbed.rounds[0]["update_norm"])
        found.setdefault(run.rows[0].task, []).append((told, seen))
    return [[task, *map(_with_range, zip(*pairs, strict=True))] for task, pairs in found.items()]


def _spread_cells(runs: Sequence[Sequence[float]]) -> tuple[str, str]:
    """Spread over the seeds of runs, a figure a round, and what share turns the median in the first and the last."""
    means = [fmean(run) for run in runs]
    first, last = (percent(fmean([turning_share(run[place]) for run in runs])) for place in (0, -1))
    return _with_range(means), f"{first}, {last} %"


def _with_range(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
