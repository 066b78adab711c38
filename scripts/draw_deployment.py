"""Draws who talks to whom in a deployment, and what travels.

python scripts/draw_deployment.py docs/deployment.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"
Point = tuple[float, float]


def box(
    axes: Axes, corner: Point, size: Point, text: str, *, color: str, fill: str = "white", bold: bool = False
) -> None:
    """A rounded box with text in its middle."""
    shape = FancyBboxPatch(corner, *size, boxstyle="round,pad=0.02,rounding_size=0.12", ec=color, fc=fill, lw=1.4)
    axes.add_patch(shape)
    middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    axes.text(*middle, text, ha="center", va="center", fontsize=8.5, weight="bold" if bold else "normal")


def frame(axes: Axes, corner: Point, size: Point, title: str) -> None:
    """A machine: a light area with its name."""
    shape = FancyBboxPatch(corner, *size, boxstyle="round,pad=0.02,rounding_size=0.2", ec=GREY, fc="#f6f7f9", lw=1.0)
    axes.add_patch(shape)
    axes.text(
        corner[0] + 0.15, corner[1] + size[1] - 0.22, title, fontsize=9.5, weight="bold", va="top", color="#111827"
    )


def arrow(axes: Axes, start: Point, end: Point, text: str, where: Point, *, color: str, align: str = "center") -> None:
    """An arrow both ways with what travels along it."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "<->", "color": color, "lw": 1.5})
    axes.text(*where, text, ha=align, va="center", fontsize=7.8, color=color)


def draw(path: Path) -> None:
    """Writes the picture."""
    figure = Figure(figsize=(11, 6.2), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, 13.2)
    axes.set_ylim(0, 7.4)
    axes.axis("off")

    frame(axes, (0.3, 0.5), (4.9, 6.6), "Server (fedeat serve)")
    box(axes, (2.9, 5.0), (1.9, 1.0), "SuperLink\nmessages on disk", color=BLUE)
    box(axes, (0.7, 5.0), (1.9, 1.0), "SuperExec\nstarts runs", color=GREY)
    box(
        axes,
        (0.7, 2.9),
        (4.1, 1.2),
        "ServerApp: Algorithm 2\nchecks each answer, geometric median,\nevaluation, report",
        color=BLUE,
    )
    box(axes, (0.7, 0.9), (4.1, 1.1), "run directory\nadapter, checkpoints, metrics, report", color=GREEN)
    arrow(axes, (3.85, 4.98), (3.85, 4.12), "orders, answers", (3.75, 4.55), color=BLUE, align="right")
    arrow(axes, (2.75, 2.88), (2.75, 2.02), "a kill loses at most one round", (2.85, 2.45), color=GREEN, align="left")

    for number, (name, y) in enumerate((("Silo A (fedeat join)", 4.95), ("Silo B", 2.75), ("Silo C", 0.55))):
        frame(axes, (7.6, y), (5.3, 2.05), name)
        box(axes, (7.85, y + 0.25), (1.35, 1.05), "SuperNode\nown key", color=BLUE)
        box(axes, (9.85, y + 0.25), (1.35, 1.05), "worker: base\nmodel, loaded\nonce", color=BLUE)
        box(axes, (11.65, y + 0.25), (1.0, 1.05), "data", color=ORANGE, fill="#fff1e6", bold=True)
        arrow(axes, (9.22, y + 0.78), (9.83, y + 0.78), "", (0, 0), color=GREY)
        arrow(axes, (11.22, y + 0.78), (11.63, y + 0.78), "", (0, 0), color=ORANGE)
        if number == 0:
            axes.text(10.52, y + 1.52, "unix socket, mode 0600", ha="center", fontsize=7, color=GREY)
            axes.text(12.15, y + 1.48, "never leaves", ha="center", fontsize=7, color=ORANGE)
        axes.annotate(
            "",
            (7.83, y + 0.78),
            (4.82, 5.5),
            arrowprops={"arrowstyle": "<->", "color": BLUE, "lw": 1.3, "connectionstyle": "arc3,rad=-0.06"},
        )
    axes.text(
        6.38,
        6.55,
        "TLS, opened by the silo,\nwhich proves itself\nwith its key",
        ha="center",
        fontsize=7.8,
        color=BLUE,
    )
    axes.text(
        6.3,
        1.3,
        "down: configuration,\nglobal adapter\n\nup: encoded update,\nnumbers (loss, steps, ...)\n\n"
        "no text, no token,\nno code that is run",
        ha="center",
        va="center",
        fontsize=7.8,
        color="#111827",
    )
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
