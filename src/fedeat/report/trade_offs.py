"""Figures of what robustness costs: robust accuracy along the radius, and accuracy against attack success."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fedeat.report.cells import display_name, method_order
from fedeat.report.figures import (
    BLUE,
    GREY,
    INK,
    PANEL_WIDTH,
    VERMILLION,
    folded,
    legend_columns,
    method_colours,
    method_lines,
    method_markers,
    shorten,
    style,
)
from fedeat.report.reading import Run
from fedeat.report.tables import FLAG, ResultTable
from fedeat.report.values import number

_KINDS = {
    "random": ("random", GREY, "o", ":"),
    "fgsm": ("FGSM", BLUE, "s", "--"),
    "pgd": ("PGD", VERMILLION, "^", "-"),
}


def robustness_figure(points: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Robust accuracy of one model along the radius, a panel a task, a line a kind of attack, with 95 % intervals.

    Args:
        points: "task", "kind", "radius", "accuracy", "accuracy_low" and "accuracy_high", shares in 0..1; the point of
            kind "none" is the accuracy without an attack.
        title: of the figure, "" for none.
    """
    tasks = list(dict.fromkeys(str(point["task"]) for point in points))
    with style():
        figure = Figure(figsize=(PANEL_WIDTH, 2.1 * max(len(tasks), 1) + 0.7), layout="constrained")
        grid = figure.subplots(max(len(tasks), 1), 1, sharex=True, squeeze=False)
        for axes, task in zip(grid[:, 0], tasks, strict=False):
            own = [point for point in points if point["task"] == task]
            for kind, (name, colour, marker, line) in _KINDS.items():
                _curve(axes, [point for point in own if point["kind"] == kind], name, colour, marker, line)
            for point in own:
                if point["kind"] == "none":
                    axes.axhline(100 * point["accuracy"], color=INK, linewidth=0.9, linestyle="-.", label="no attack")
            axes.set_title(task)
        _radius_axes(list(grid[:, 0]), [float(point["radius"]) for point in points if point["kind"] != "none"])
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4, handlelength=1.8, columnspacing=1.0)
        if title:
            figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.02, ha="left")
    return figure


def curve_points(run: Run) -> list[dict[str, Any]]:
    """The points of a run's robustness curve that can be drawn; others are left out."""
    stored = run.curve.get("points")
    found = []
    for point in stored if isinstance(stored, list) else ():
        known = point if isinstance(point, Mapping) else {}
        values = {key: number(known.get(key)) for key in ("radius", "accuracy", "accuracy_low", "accuracy_high")}
        if None not in values.values():
            words = {"task": str(known.get("task")), "kind": str(known.get("kind"))}
            found.append({**values, **words, "texts": number(known.get("texts"))})
    return found


def mean_curves(runs: Sequence[Run], task: str, kind: str = "pgd") -> dict[str, list[dict[str, Any]]]:
    """Method -> its points on a task under one kind of attack, each a mean over the runs that have that radius.

    The accuracy without an attack is the point at radius 0.
    """
    gathered: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for run in runs:
        for point in curve_points(run):
            if point["task"] == task and point["kind"] in (kind, "none"):
                gathered.setdefault(run.method, {}).setdefault(point["radius"], []).append(point)
    keys = ("accuracy", "accuracy_low", "accuracy_high")
    return {
        method: [
            {"radius": radius, **{key: math.fsum(p[key] for p in points) / len(points) for key in keys}}
            for radius, points in sorted(gathered[method].items())
        ]
        for method in method_order(gathered)
    }


def method_curves_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str, everyone: Sequence[str] = ()
) -> Figure:
    """Robust accuracy of several methods under PGD along the radius, on one task, each with its 95 % band.

    Args:
        curves: method -> its points, as `robustness_figure` takes them, of one task and kind.
        title: of the panel.
        everyone: all methods of a page, so that each looks the same in all its figures; the curves' where empty.
    """
    looks = everyone or list(curves)
    colours, markers, lines = method_colours(looks), method_markers(looks), method_lines(looks)
    with style():
        figure = Figure(figsize=(PANEL_WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        for method, points in curves.items():
            _curve(axes, points, shorten(display_name(method)), colours[method], markers[method], lines[method])
        _radius_axes([axes], [float(point["radius"]) for points in curves.values() for point in points])
        axes.set_title(title)
        names = [shorten(display_name(method)) for method in curves]
        columns = legend_columns(names, handle=8, limit=4)
        figure.legend(loc="outside lower left", ncols=columns, handlelength=2.4, columnspacing=1.2)
    return figure


def scatter_figure(table: ResultTable, task: str, everyone: Sequence[str] = ()) -> Figure:
    """Accuracy against attack success rate of every method on one task, with both intervals; up and left is better.

    Args:
        table: what is drawn.
        task: of the table's.
        everyone: all methods of a page, so that each looks the same in all its figures; the table's where empty.
    """
    colours, markers = method_colours(everyone or table.methods), method_markers(everyone or table.methods)
    with style():
        figure = Figure(figsize=(PANEL_WIDTH, 3.1), layout="constrained")
        axes = figure.subplots()
        for method in table.methods:
            cell = table.cells.get((method, task))
            if cell is None or cell.accuracy.mean is None or cell.asr.mean is None:
                continue
            x, y = 100 * cell.asr.mean, 100 * cell.accuracy.mean
            look: dict[str, Any] = {"color": colours[method], "linewidth": 1.1, "alpha": 0.75}
            if cell.asr.low is not None and cell.asr.high is not None:
                axes.plot([100 * cell.asr.low, 100 * cell.asr.high], [y, y], **look)
            if cell.accuracy.low is not None and cell.accuracy.high is not None:
                axes.plot([x, x], [100 * cell.accuracy.low, 100 * cell.accuracy.high], **look)
            name = shorten(display_name(method)) + (f" {FLAG}" if cell.flags else "")
            face = "white" if cell.flags else colours[method]
            axes.plot(
                [x], [y], markers[method], color=colours[method], markerfacecolor=face, markersize=7,
                label=name, zorder=3,
            )  # fmt: skip
        axes.set_xlabel("Attack success rate (%), lower is better")
        axes.set_ylabel("Accuracy (%)")
        axes.set_title(folded(f"{task}; {table.condition.title}"))
        axes.grid(visible=True)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = legend_columns(labels, handle=5, limit=3)
            figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=1.2, columnspacing=1.2)
    return figure


def _curve(axes: Any, points: Sequence[Mapping[str, Any]], name: str, colour: str, marker: str, line: str) -> None:
    if not points:
        return
    ordered = sorted(points, key=lambda point: float(point["radius"]))
    radii = [float(point["radius"]) for point in ordered]
    axes.plot(
        radii, [100 * point["accuracy"] for point in ordered], line, color=colour, marker=marker, markersize=4,
        linewidth=1.5, label=name,
    )  # fmt: skip
    lows, highs = ([100 * point[key] for point in ordered] for key in ("accuracy_low", "accuracy_high"))
    axes.fill_between(radii, lows, highs, color=colour, alpha=0.13, linewidth=0)


def _radius_axes(grid: Sequence[Any], radii: Sequence[float]) -> None:
    shown = sorted({radius for radius in radii if radius > 0})
    shown = shown[:: -(-len(shown) // 7) or 1]
    for axes in grid:
        axes.set_ylim(0, 102)
        axes.set_ylabel("Robust accuracy (%)")
        axes.grid(visible=True)
        if 0.0 in radii and shown:  # no logarithm reaches zero: from there to the smallest radius the axis is even
            axes.set_xscale("symlog", linthresh=shown[0], linscale=0.5)
        else:
            axes.set_xscale("log")
        ticks = [*([0.0] if 0.0 in radii else []), *shown]
        axes.set_xticks(ticks, [f"{radius:g}" for radius in ticks])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    grid[-1].set_xlabel("Radius (relative to the mean embedding norm)")
