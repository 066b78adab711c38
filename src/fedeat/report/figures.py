"""Figures of results: accuracy and ASR bars (the paper's Figs. 3 and 4) and the calibration curve over the radius.

Every panel is a figure of its own, narrow enough to be read on a phone; the page sets several side by side. Figures
are built without pyplot, so no state is shared and no display is needed.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedeat.report.cells import Estimate, display_name, method_order
from fedeat.report.tables import FLAG, ResultTable, by_task

# Okabe and Ito's palette, told apart with every common kind of colour blindness.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, YELLOW = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442",
)  # fmt: skip
GREY = "#9A9A9A"
INK = "#222222"
METHOD_COLOURS = {"base": GREY, "fedavg": ORANGE, "eat": SKY, "gm": GREEN, "fedeat": BLUE}
_SPARE_COLOURS = (PURPLE, VERMILLION, "#000000", YELLOW)
METHOD_MARKERS = {"base": "X", "fedavg": "o", "eat": "s", "gm": "^", "fedeat": "D"}
_SPARE_MARKERS = ("v", "P", "*", "<", ">", "p", "h")
PANEL_WIDTH = 4.2  # inches; 403 CSS pixels, so 8 pt text stays above 7 pt on a 360 pixel phone

_STYLE: Any = {
    "text.parse_math": False,  # names come from data: a lone "$" must not be parsed
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedeat",  # the same records give the same bytes
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of every figure, for as long as it is drawn or saved."""
    with mpl.rc_context(_STYLE):
        yield


def svg(figure: Figure) -> str:
    """The figure as SVG text, without a date, set in whichever sans serif the reader has."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    # Laid out with DejaVu's wide letters, so the narrower faces of phones and browsers fit too.
    return buffer.getvalue().replace("'DejaVu Sans'", "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans'")


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes at 200 dots an inch."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the same on every figure of a page."""
    return _looks(methods, METHOD_COLOURS, _SPARE_COLOURS)


def method_markers(methods: Sequence[str]) -> dict[str, str]:
    """A marker for each method, the same on every figure of a page."""
    return _looks(methods, METHOD_MARKERS, _SPARE_MARKERS)


def method_lines(methods: Sequence[str]) -> dict[str, str]:
    """A line style for each method, the same on every figure of a page."""
    return {method: ("-", "--", "-.", ":")[index % 4] for index, method in enumerate(method_order(methods))}


def _looks(methods: Sequence[str], known: Mapping[str, str], spare: Sequence[str]) -> dict[str, str]:
    ordered = method_order(methods)
    others = [method for method in ordered if method not in known]
    return {method: known.get(method) or spare[others.index(method) % len(spare)] for method in ordered}


def shorten(text: str, limit: int = 24) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def folded(text: str, width: int = 48, lines: int = 2) -> str:
    """A title of at most so many lines; what does not fit is cut."""
    return "\n".join(textwrap.wrap(shorten(text, width * lines - 8), width))


def legend_columns(labels: Sequence[str], *, handle: int, limit: int) -> int:
    """How many columns of a legend fit a panel's width, `handle` being the width of a key in letters."""
    longest = max((len(label) for label in labels), default=1)
    return max(1, min(len(labels), limit, 58 // (longest + handle)))


def accuracy_figure(table: ResultTable, everyone: Sequence[str] = ()) -> Figure:
    """Accuracy by task and method with 95 % intervals under one condition (the paper's Fig. 3).

    Args:
        table: what is drawn.
        everyone: all methods of a page, so that each looks the same in all its figures; the table's where empty.
    """
    return _bars(table, {key: cell.accuracy for key, cell in table.cells.items()}, "Accuracy (%)", everyone)


def asr_figure(table: ResultTable, everyone: Sequence[str] = ()) -> Figure:
    """Attack success rate by task and method with 95 % intervals under one condition (the paper's Fig. 4).

    Args:
        table: what is drawn.
        everyone: as `accuracy_figure` takes them.
    """
    return _bars(table, {key: cell.asr for key, cell in table.cells.items()}, "Attack success rate (%)", everyone)


def conditions_figure(
    tables: Sequence[ResultTable], task: str, measure: Literal["accuracy", "asr"], everyone: Sequence[str] = ()
) -> Figure:
    """Accuracy or attack success rate on one task, conditions down, a mark and its 95 % interval for each method.

    Args:
        tables: one a condition.
        task: which of theirs is drawn.
        measure: what of it.
        everyone: as `accuracy_figure` takes them; the methods of all tables where empty.
    """
    shown, methods = by_task(tables)[task]
    everyone = everyone or method_order(method for table in tables for method in table.methods)
    colours, markers = method_colours(everyone), method_markers(everyone)
    lines, centres, edges = _lines_of_conditions(shown, methods, task, measure)
    handles, flagged = [], False
    ends: list[float] = []
    with style():
        figure = Figure(figsize=(PANEL_WIDTH, 1.0 + 0.115 * edges[-1]), layout="constrained")
        axes = figure.subplots()
        for method in methods:
            look: dict[str, Any] = {"color": colours[method], "marker": markers[method], "markersize": 4}
            for row, table in enumerate(shown):
                if (row, method) not in lines:
                    continue
                cell, y = table.cells[method, task], lines[row, method]
                value, flagged = getattr(cell, measure), flagged or bool(cell.flags)
                ends += [100 * end for end in (value.low, value.mean, value.high) if end is not None]
                if value.low is not None and value.high is not None:
                    axes.plot([100 * value.low, 100 * value.high], [y, y], color=colours[method], linewidth=1.1)
                face = "white" if cell.flags else colours[method]
                axes.plot([100 * value.mean], [y], markerfacecolor=face, linestyle="", zorder=3, **look)
            handles.append(Line2D([], [], linestyle="", label=shorten(display_name(method)), **look))
        if flagged:
            hollow: dict[str, Any] = {"color": INK, "markerfacecolor": "white", "marker": "o", "markersize": 4}
            handles.append(Line2D([], [], linestyle="", label=f"{FLAG} flagged", **hollow))
        names = [table.condition.title.replace(" % malicious clients", " %") for table in shown]
        axes.set_yticks(centres, ["\n".join(textwrap.wrap(shorten(name, 44), 22)) for name in names])
        axes.set_ylim(edges[-1], 0)
        for edge in edges[:-1]:
            axes.axhline(edge, color="#DDDDDD", linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        # Marks, unlike bars, need no zero: the axis begins and ends at a multiple of ten around all intervals.
        axes.set_xlim(
            max(0, (min(ends, default=0) - 1) // 10 * 10), min(100, -(-(max(ends, default=100) + 1) // 10) * 10)
        )
        axes.set_xlabel("Accuracy (%)" if measure == "accuracy" else "Attack success rate (%)")
        axes.grid(visible=True, axis="x")
        axes.set_title(folded(task))
        columns = legend_columns([str(handle.get_label()) for handle in handles], handle=4, limit=5)
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handletextpad=0.1, columnspacing=0.9)
    return figure


def _lines_of_conditions(
    shown: Sequence[ResultTable], methods: Sequence[str], task: str, measure: Literal["accuracy", "asr"]
) -> tuple[dict[tuple[int, str], float], list[float], list[float]]:
    """Where each (condition's index, method) that has a value stands, the conditions' centres and their lower edges.

    A condition is as high as it has methods, and at least as high as its name.
    """
    lines: dict[tuple[int, str], float] = {}
    centres, edges, top = [], [], 0.0
    for row, table in enumerate(shown):
        cells = {method: table.cells[method, task] for method in methods if (method, task) in table.cells}
        own = [method for method, cell in cells.items() if getattr(cell, measure).mean is not None]
        height = max(len(own), 2) + 1
        first = top + (height - len(own) + 1) / 2
        lines |= {(row, method): first + index for index, method in enumerate(own)}
        centres.append(top + height / 2)
        top += height
        edges.append(top)
    return lines, centres, edges


def calibration_figure(points: Sequence[Mapping[str, Any]], recommended: float | None) -> Figure:
    """Loss and accuracy, clean and under the perturbation, along the radius (logarithmic axis).

    Args:
        points: one mapping a radius with "radius" (>= 0, relative to the mean embedding norm), "clean_loss",
            "adversarial_loss", "accuracy" and "adversarial_accuracy" (shares in 0..1); None leaves a point out.
            A radius of zero cannot stand on a logarithmic axis; its values are drawn as dotted levels.
        recommended: the radius to mark, None for none.
    """
    ordered = sorted(points, key=lambda point: float(point["radius"]))
    panels = [("Loss", (("clean_loss", "clean"), ("adversarial_loss", "adversarial")), 1.0)]
    if any(point.get(key) is not None for point in ordered for key in ("accuracy", "adversarial_accuracy")):
        panels.append(("Accuracy (%)", (("accuracy", "clean"), ("adversarial_accuracy", "adversarial")), 100.0))
    with style():
        figure = Figure(figsize=(PANEL_WIDTH, 2.0 * len(panels) + 0.6), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axes, (label, series, scale) in zip(grid[:, 0], panels, strict=True):
            for index, (key, name) in enumerate(series):
                colour = (BLUE, VERMILLION)[index]
                known = [point for point in ordered if point.get(key) is not None]
                usable = [(float(point["radius"]), scale * float(point[key])) for point in known]
                shown = [pair for pair in usable if pair[0] > 0]
                axes.plot(
                    [radius for radius, _ in shown], [value for _, value in shown],
                    color=colour, marker="os"[index], markersize=4, linewidth=1.4, label=name,
                )  # fmt: skip
                for _, value in (pair for pair in usable if pair[0] == 0):
                    axes.axhline(value, color=colour, linestyle=":", linewidth=0.9)
            if recommended:
                name = f"recommended {recommended:g}"
                axes.axvline(recommended, color=INK, linestyle="--", linewidth=0.9, label=name)
            axes.set_ylabel(label)
            axes.grid(visible=True)
            if scale == 100.0:
                axes.set_ylim(0, 102)
        bottom = grid[-1, 0]
        bottom.set_xscale("log")
        radii = [float(point["radius"]) for point in ordered if point["radius"] > 0]
        bottom.set_xticks(_sparse(radii), [f"{radius:g}" for radius in _sparse(radii)])
        bottom.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        bottom.set_xlabel("Perturbation radius (relative to the mean embedding norm)")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _sparse(values: Sequence[float], limit: int = 7) -> list[float]:
    step = -(-len(values) // limit) or 1
    return list(values[::step])


def _bars(
    table: ResultTable, values: Mapping[tuple[str, str], Estimate], label: str, everyone: Sequence[str]
) -> Figure:
    colours = method_colours(everyone or table.methods)
    width = 0.84 / max(len(table.methods), 1)
    flagged = False
    with style():
        inches = max(PANEL_WIDTH, 0.9 + 0.13 * len(table.tasks) * (len(table.methods) + 1))
        figure = Figure(figsize=(inches, 2.9), layout="constrained")
        axes = figure.subplots()
        for index, method in enumerate(table.methods):
            for position, task in enumerate(table.tasks):
                cell = table.cells.get((method, task))
                if cell is None:
                    continue
                x = position + (index - (len(table.methods) - 1) / 2) * width
                flagged |= bool(cell.flags)
                _bar(axes, x, width, values[method, task], colours[method], flagged=bool(cell.flags))
        names = ["\n".join(textwrap.wrap(shorten(task, 26), 13)) for task in table.tasks]
        axes.set_xticks(range(len(table.tasks)), names)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.55, len(table.tasks) - 0.45)
        axes.set_ylim(0, 106)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel(label)
        axes.grid(visible=True, axis="y")
        axes.set_title(table.condition.title)
        handles = [Patch(color=colours[method], label=shorten(display_name(method))) for method in table.methods]
        if flagged:
            handles.append(Patch(facecolor="white", edgecolor=INK, hatch="/////", label=f"{FLAG} flagged"))
        columns = legend_columns([str(handle.get_label()) for handle in handles], handle=4, limit=3)
        figure.legend(
            handles=handles, loc="outside lower left", ncols=columns, handlelength=1.0, handletextpad=0.5,
            columnspacing=0.9,
        )  # fmt: skip
    return figure


def _bar(axes: Axes, x: float, width: float, value: Estimate, colour: str, *, flagged: bool) -> None:
    if value.mean is None:
        axes.text(x, 1.5, "undefined", rotation=90, ha="center", va="bottom", fontsize=6.5, color="#666666")
        return
    top = 100 * value.mean
    if flagged:
        axes.bar(x, top, 0.92 * width, facecolor="white", edgecolor=colour, hatch="/////", linewidth=0.8)
    else:
        axes.bar(x, top, 0.92 * width, color=colour)
    if value.low is not None and value.high is not None:
        axes.plot([x, x], [100 * value.low, 100 * value.high], color=INK, linewidth=1.0, solid_capstyle="butt")
        top = max(top, 100 * value.high)
    if flagged:
        axes.text(x, top + 0.8, FLAG, ha="center", va="bottom", fontsize=8)
