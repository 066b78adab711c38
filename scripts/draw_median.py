"""Draws docs/median.png: the mean dragged away by three of ten clients, the geometric median staying.

python scripts/draw_median.py docs/median.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import fedeat
from fedeat import aggregation

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b7280"
RULES: dict[str, tuple[aggregation.AnyRule, str, str]] = {
    "mean": (aggregation.mean, ORANGE, "-"),
    "coordinate median": (aggregation.coordinate_median, PURPLE, "-."),
    "Krum": (aggregation.krum, BLUE, ":"),
    "geometric median": (aggregation.geometric_median, GREEN, "-"),
}


def updates_at(distance: float, width: int) -> Tensor:
    """Seven honest updates about zero and three malicious ones at a distance along one direction."""
    generator = torch.Generator().manual_seed(8)
    honest = torch.randn(7, width, generator=generator, dtype=torch.float64)
    honest -= honest.mean(0)
    direction = torch.nn.functional.normalize(
        torch.tensor([1.0, 0.55] + [0.3] * (width - 2), dtype=torch.float64), dim=0
    )
    malicious = distance * direction + 0.2 * torch.randn(3, width, generator=generator, dtype=torch.float64)
    return torch.cat([honest, malicious])


def draw_plane(axes: Axes) -> None:
    """Where the mean and the median are as the malicious updates move out."""
    distances = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    updates = updates_at(distances[-1], 2)
    axes.plot(updates[:7, 0], updates[:7, 1], "o", color=GREY, ms=7, label="seven honest updates")
    axes.plot(updates[7:, 0], updates[7:, 1], "X", color="black", ms=9, label="three malicious ones, moving out")
    for distance in distances[1:-1]:
        passing = updates_at(distance, 2)[7:]
        axes.plot(passing[:, 0], passing[:, 1], "X", color="black", ms=6, alpha=0.25)
    for rule, color, marker, label in (
        (fedeat.mean, ORANGE, "s", "the mean follows them"),
        (fedeat.geometric_median, GREEN, "D", "the geometric median stays"),
    ):
        track = torch.stack([fedeat.aggregate(updates_at(distance, 2), rule=rule).value for distance in distances])
        axes.plot(track[:, 0], track[:, 1], "-", color=color, lw=1.5, alpha=0.6)
        axes.plot(track[:, 0], track[:, 1], marker, color=color, ms=6, alpha=0.5)
        axes.plot(track[-1:, 0], track[-1:, 1], marker, color=color, ms=11, label=label)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.set_title("Three of ten clients move away", fontsize=11, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_displacement(axes: Axes) -> None:
    """Distance of each rule's result from the honest mean, against that of the attackers."""
    distances = torch.logspace(-1, 6, 36).tolist()
    for name, (rule, color, line) in RULES.items():
        moved = [
            float(torch.linalg.vector_norm(fedeat.aggregate(updates_at(d, 20), rule=rule).value)) for d in distances
        ]
        axes.plot(distances, moved, line, color=color, lw=2, label=name)
    spread = float(torch.linalg.vector_norm(updates_at(0.0, 20)[:7], dim=1).max())
    bound = 2 / (1 - 2 * 0.3) * spread
    axes.axhline(bound, color=GREEN, ls="--", lw=1)
    axes.text(distances[0], bound * 1.15, "the median's bound", color=GREEN, fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="distance of the malicious updates", ylabel="distance of the result")
    axes.set_title("However far, only the mean follows", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Writes the picture to the path given."""
    figure = Figure(figsize=(9.4, 3.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    plane, displacement = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_plane(plane)
    draw_displacement(displacement)
    figure.savefig(Path(sys.argv[1]), dpi=170)


if __name__ == "__main__":
    main()
