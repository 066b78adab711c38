"""Figures of what happened in training: loss and accuracy per round, client weights, and who holds which data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedeat.records import table
from fedeat.report.cells import display_name
from fedeat.report.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PANEL_WIDTH,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    folded,
    legend_columns,
    method_colours,
    method_lines,
    method_markers,
    shorten,
    style,
)
from fedeat.report.reading import Run
from fedeat.report.values import Record, client_ids, number

_LABEL_LIMIT = 15
_BAR_LIMIT = 60
# From a clear light blue, so that a weight of zero is not taken for a client that was not sampled.
_WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#DCEBF7", "#6BAED6", BLUE, "#03284A"])


def curves_figure(
    series: Mapping[str, Sequence[Mapping[int, float]]], title: str, label: str, everyone: Sequence[str] = ()
) -> Figure:
    """One line a name over rounds: the mean over its runs, with a band from the lowest to the highest run.

    Args:
        series: for each name (a method, or a task) its runs, each a value by round; percentages when `label` ends
            in "(%)", else losses, drawn on a logarithmic axis once they span more than a factor of 30.
        title: panel title.
        label: label of the vertical axis.
        everyone: all methods of a page, so that each looks the same in all its figures; empty where names are tasks.
    """
    looks = everyone or list(series)
    colours, markers, lines = method_colours(looks), method_markers(looks), method_lines(looks)
    if not everyone:
        palette = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)
        colours = {name: palette[index % len(palette)] for index, name in enumerate(series)}
    values: list[float] = []
    with style():
        figure = Figure(figsize=(PANEL_WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        for name, runs in series.items():
            rounds = sorted({step for run in runs for step in run})
            present = [[run[step] for run in runs if step in run] for step in rounds]
            means = [math.fsum(found) / len(found) for found in present]
            values += [value for found in present for value in found]
            axes.plot(
                rounds, means, lines[name], color=colours[name], linewidth=1.6, markersize=4,
                marker=markers[name], markevery=max(1, len(rounds) // 12),
                label=shorten(display_name(name)),
            )  # fmt: skip
            if len(runs) > 1:
                axes.fill_between(
                    rounds, [min(found) for found in present], [max(found) for found in present],
                    color=colours[name], alpha=0.15, linewidth=0,
                )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        steps = {step for runs in series.values() for run in runs for step in run}
        if len(steps) == 1:
            axes.set_xlim(min(steps) - 1, min(steps) + 1)
        axes.set_xlabel("Round")
        axes.set_ylabel(label)
        axes.set_title(title)
        axes.grid(visible=True)
        if label.endswith("(%)"):
            axes.set_ylim(0, 102)
        elif values and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        columns = legend_columns([shorten(display_name(name)) for name in series], handle=8, limit=4)
        figure.legend(loc="outside lower left", ncols=columns, handlelength=2.4, columnspacing=1.2)
    return figure


def losses(run: Run) -> dict[int, float]:
    """Mean client loss by round."""
    found = {int(line["round"]): number(line.get("loss")) for line in run.rounds}
    return {step: value for step, value in found.items() if value is not None}


def accuracies(run: Run) -> dict[str, dict[int, float]]:
    """Accuracy in percent by task and round, of the runs that were evaluated while they trained."""
    found: dict[str, dict[int, float]] = {}
    for line in run.evaluations:
        value = number(line.get("accuracy"))
        if value is not None:
            found.setdefault(str(line.get("task", "")), {})[int(line["round"])] = 100 * value
    return found


def mean_accuracy(run: Run) -> dict[int, float]:
    """Accuracy in percent by round, the mean over the tasks evaluated in it."""
    gathered: dict[int, list[float]] = {}
    for by_round in accuracies(run).values():
        for step, value in by_round.items():
            gathered.setdefault(step, []).append(value)
    return {step: math.fsum(values) / len(values) for step, values in gathered.items()}


def malicious_clients(run: Run) -> list[int]:
    """Clients that were malicious in any recorded round."""
    found = {client for line in run.rounds for client in client_ids(line.get("malicious"))}
    marked = [line.get("client") for line in run.clients if line.get("malicious") is True]
    found |= set(client_ids(marked))
    return sorted(found)


def all_clients(run: Run) -> list[int]:
    """Every client of the federation that the records name."""
    count = number(table(run.config, "partition").get("clients")) or 0
    found = set(run.partition) or (set(range(int(count))) if 0 < count <= 10_000 else set())
    found |= {client for line in run.rounds for client in client_ids(line.get("cohort"))}
    return sorted(found)


def weight_bounds(runs: Sequence[Run]) -> tuple[float, bool]:
    """The largest client weight of all runs, and whether it dwarfs an even share so that a root scale reads better."""
    largest, even = 0.0, 1.0
    for run in runs:
        for line in run.rounds:
            weights = _weights(line)
            largest = max([largest, *weights.values()])
            even = min(even, 1 / len(weights)) if weights else even
    return largest or 1.0, largest > 4 * even


def weights_figure(run: Run, title: str, bounds: tuple[float, bool] | None = None) -> Figure:
    """Client weights of one run, rounds down and clients across.

    A blank cell was not sampled, a cross was rejected, and a framed column with a marked number is malicious.

    Args:
        run: the run, with at least one recorded round.
        title: panel title.
        bounds: what `weight_bounds` gives for all runs on the page, so that panels share one scale.
    """
    clients, malicious = all_clients(run), malicious_clients(run)
    column = {client: index for index, client in enumerate(clients)}
    rounds = [int(line["round"]) for line in run.rounds]
    grid = np.full((len(rounds), len(clients)), np.nan)
    rejected: list[tuple[int, int]] = []
    for index, line in enumerate(run.rounds):
        for client, weight in _weights(line).items():
            if client in column:
                grid[index, column[client]] = weight
        refused = {client for entry in rejections(line) for client in client_ids([entry.get("client")])}
        rejected += [(column[client], index) for client in refused if client in column]
    largest, rooted = bounds or weight_bounds([run])
    norm = PowerNorm(0.5, 0, largest) if rooted else Normalize(0, largest)
    with style():
        height = min(max(0.17 * len(rounds), 0.7), 3.4) + 0.95
        figure = Figure(figsize=(2.75, height), layout="constrained")
        axes = figure.subplots()
        mesh = axes.pcolormesh(
            np.arange(len(clients) + 1) - 0.5, np.arange(len(rounds) + 1) - 0.5, np.ma.masked_invalid(grid),
            cmap=_WEIGHTS, norm=norm, edgecolors="white", linewidth=0.6 if grid.size <= 600 else 0,
            rasterized=grid.size > 600,
        )  # fmt: skip
        if rejected:
            size = max(4.0, min(26.0, 9000 / grid.size))
            x, y = [across for across, _ in rejected], [down for _, down in rejected]
            axes.scatter(x, y, marker="x", s=size, color=INK, linewidth=1.1)
        frame: dict[str, Any] = {"fill": False, "edgecolor": VERMILLION, "clip_on": False}
        for client in malicious:
            if client in column:
                corner = (column[client] - 0.5, -0.5)
                line_width = min(max(25 / len(clients), 0.5), 1.5)  # never wider than the column it frames
                axes.add_patch(Rectangle(corner, 1, len(rounds), linewidth=line_width, **frame))
        axes.invert_yaxis()
        _weight_axes(axes, clients, malicious, rounds)
        axes.set_title(folded(title, 38), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(7.5)
        axes.yaxis.label.set_fontsize(7.5)
        _weight_key(figure, mesh, malicious=bool(malicious), rejected=bool(rejected), blank=bool(np.isnan(grid).any()))
    return figure


def partition_figure(partition: Mapping[int, Mapping[str, float]], title: str, malicious: Sequence[int] = ()) -> Figure:
    """Examples a client holds, stacked by label; labels of one task ("task:label") share a hue."""
    totals: dict[str, float] = {}
    for counts in partition.values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0.0) + count
    kept = set(sorted(totals, key=lambda name: -totals[name])[: _LABEL_LIMIT if len(totals) > _LABEL_LIMIT else None])
    names = [name for name in sorted(totals) if name in kept]
    colours = _label_colours(names)
    clients = list(partition)
    with style():
        figure = Figure(figsize=(min(max(PANEL_WIDTH, 0.22 * len(clients) + 1), 9.0), 3.3), layout="constrained")
        axes = figure.subplots()
        floor = [0.0] * len(clients)
        for name in [*names, "other"]:
            if name == "other":
                heights = [sum(v for k, v in partition[client].items() if k not in kept) for client in clients]
                colours[name] = GREY
            else:
                heights = [partition[client].get(name, 0.0) for client in clients]
            if not any(heights):
                continue
            top = [below + height for below, height in zip(floor, heights, strict=True)]
            look: dict[str, Any] = {"color": colours[name], "label": shorten(name, 26)}
            if len(clients) <= _BAR_LIMIT:
                axes.bar(range(len(clients)), heights, 0.8, bottom=floor, edgecolor="white", linewidth=0.3, **look)
            else:  # hundreds of bars a label would make megabytes
                edges = np.arange(len(clients) + 1) - 0.5
                axes.stairs(top, edges, baseline=floor, fill=True, linewidth=0, rasterized=True, **look)
            floor = top
        _client_ticks(axes, clients, malicious)
        axes.set_xlim(-0.6, len(clients) - 0.4)
        axes.set_xlabel("Client")
        axes.set_ylabel("Training examples")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(title)
        axes.grid(visible=True, axis="y")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower left", ncols=legend_columns(labels, handle=4, limit=3),
            handlelength=1.0, columnspacing=1.2,
        )  # fmt: skip
    return figure


def rejections(line: Record) -> list[Record]:
    """The rejected updates of one round, each {"client", "reason"}."""
    found = line.get("rejected")
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def _weights(line: Record) -> dict[int, float]:
    stored = line.get("weights")
    found: dict[int, float] = {}
    for key, value in stored.items() if isinstance(stored, Mapping) else ():
        weight = number(value)
        for client in client_ids([key]):
            if weight is not None:
                found[client] = max(weight, 0.0)
    return found


def _weight_axes(axes: Axes, clients: Sequence[int], malicious: Sequence[int], rounds: Sequence[int]) -> None:
    _client_ticks(axes, clients, malicious)
    step = -(-len(rounds) // 10) or 1
    axes.set_yticks(range(0, len(rounds), step), [str(index) for index in rounds[::step]])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("Client")
    axes.set_ylabel("Round")


def _client_ticks(axes: Axes, clients: Sequence[int], malicious: Sequence[int]) -> None:
    step = -(-len(clients) // 20) or 1
    axes.set_xticks(range(0, len(clients), step), [str(client) for client in clients[::step]])
    for label, client in zip(axes.get_xticklabels(), clients[::step], strict=True):
        if client in malicious:
            label.set_color(VERMILLION)
            label.set_fontweight("bold")


def _weight_key(figure: Figure, mesh: QuadMesh, *, malicious: bool, rejected: bool, blank: bool) -> None:
    bar = figure.colorbar(mesh, ax=figure.axes[0], pad=0.02, aspect=15 * figure.get_figheight() - 12)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0)
    bar.locator = MaxNLocator(3)
    bar.update_ticks()
    bar.set_label("weight", fontsize=7.5)
    handles: list[Patch | Line2D] = []
    if malicious:
        handles.append(Patch(facecolor="none", edgecolor=VERMILLION, linewidth=1.5, label="malicious"))
    if rejected:
        handles.append(Line2D([], [], linestyle="", marker="x", markersize=4.5, color=INK, label="rejected"))
    if blank:
        handles.append(Patch(facecolor="white", edgecolor="#BBBBBB", linewidth=0.6, label="not sampled"))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower left", ncols=3, fontsize=7, handlelength=1.0, handletextpad=0.5,
            columnspacing=0.9,
        )  # fmt: skip


def _label_colours(names: Sequence[str]) -> dict[str, str | tuple[float, float, float]]:
    hues = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, YELLOW)
    tasks = list(dict.fromkeys(name.rpartition(":")[0] for name in names))
    if tasks in ([], [""]):
        return {name: (*hues, GREY)[index % 8] for index, name in enumerate(names)}
    colours: dict[str, str | tuple[float, float, float]] = {}
    for position, task in enumerate(tasks):
        members = [name for name in names if name.rpartition(":")[0] == task]
        for index, name in enumerate(members):
            # Towards white within a task, never past a tint that still stands out on paper.
            tint = 0.62 * index / max(len(members) - 1, 1)
            red, green, blue = (channel + (1 - channel) * tint for channel in to_rgb(hues[position % len(hues)]))
            colours[name] = (red, green, blue)
    return colours
