"""Draws the README's picture with the package's own functions: what a client does, and what the server does.

python scripts/draw_overview.py docs/overview.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

import fedeat

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"


def loss_at(points: Tensor) -> Tensor:
    """A smooth loss over a plane of embeddings (..., 2), with a ridge to climb."""
    x, y = points[..., 0], points[..., 1]
    return torch.log1p(torch.exp(1.6 * x + 0.9 * y - 0.5)) + 0.35 * torch.sin(1.7 * y + 0.4) * x


def draw_client(axes: Axes) -> None:
    """Ascent inside the ball around one token's embedding (Alg. 1)."""
    grid = torch.stack(torch.meshgrid(torch.linspace(-2, 2, 200), torch.linspace(-2, 2, 200), indexing="xy"), dim=-1)
    axes.contourf(grid[..., 0], grid[..., 1], loss_at(grid), levels=14, cmap="Greys", alpha=0.55)
    z = torch.tensor([[[-0.35, -0.3]]])
    path = [z]
    for steps in range(1, 6):
        delta = fedeat.pgd(
            lambda d: loss_at(z + d).sum(),
            z,
            torch.ones(1, 1, dtype=torch.bool),
            torch.Generator(),
            radius=1.1,
            steps=steps,
            step_size=0.42,
        )
        path.append(z + delta)
    track = torch.cat(path).squeeze(1)
    axes.add_patch(Circle((float(z[0, 0, 0]), float(z[0, 0, 1])), 1.1, fill=False, color=BLUE, lw=1.6))
    axes.plot(track[:, 0], track[:, 1], "-o", color=ORANGE, ms=4, lw=1.6)
    axes.plot(track[0, 0], track[0, 1], "o", color=BLUE, ms=9)
    axes.plot(track[-1, 0], track[-1, 1], "*", color=ORANGE, ms=16)
    axes.annotate(
        "embedding of a\nprompt token",
        track[0].tolist(),
        (-1.85, -1.75),
        color=BLUE,
        fontsize=10,
        arrowprops={"arrowstyle": "-", "color": BLUE, "lw": 0.8},
    )
    axes.annotate(
        "worst point of the ball:\nthe adapter trains here",
        track[-1].tolist(),
        (-0.75, 1.45),
        color=ORANGE,
        fontsize=10,
        arrowprops={"arrowstyle": "-", "color": ORANGE, "lw": 0.8},
    )
    axes.set_title("Each client trains at the worst point of a small ball", fontsize=11, loc="left")
    axes.text(1.95, -1.93, "darker = higher loss", ha="right", va="bottom", fontsize=8, color=GREY)
    axes.set_xlim(-2, 2)
    axes.set_ylim(-2, 2)


def draw_server(axes: Axes) -> None:
    """Seven honest updates and three malicious ones: where the mean goes and where the median stays (Alg. 2)."""
    generator = torch.Generator().manual_seed(8)
    honest = torch.tensor([0.0, 0.0]) + 0.6 * torch.randn(7, 2, generator=generator)
    malicious = torch.tensor([5.2, 3.4]) + 0.55 * torch.randn(3, 2, generator=generator)
    updates = torch.cat([honest, malicious]).double()
    mean = fedeat.aggregate(updates, rule=fedeat.mean).value
    median = fedeat.aggregate(updates, rule=fedeat.geometric_median).value
    axes.plot(honest[:, 0], honest[:, 1], "o", color=BLUE, ms=8, label="honest updates")
    axes.plot(malicious[:, 0], malicious[:, 1], "X", color=GREY, ms=9, label="malicious updates")
    axes.plot(mean[0], mean[1], "s", color=ORANGE, ms=11, label="their mean")
    axes.plot(median[0], median[1], "D", color=GREEN, ms=11, label="their geometric median")
    axes.annotate(
        "",
        mean.tolist(),
        honest.mean(0).tolist(),
        arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 1.4, "shrinkA": 14, "shrinkB": 9},
    )
    axes.legend(loc="upper left", frameon=False, fontsize=10)
    axes.set_title("The server takes a median that no minority can drag away", fontsize=11, loc="left")
    axes.set_xlim(-1.9, 6.9)
    axes.set_ylim(-2.2, 4.4)


def main() -> None:
    """Writes the picture to the path given."""
    figure = Figure(figsize=(9.2, 3.7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    client, server = figure.subplots(1, 2, width_ratios=(1, 1.35))
    draw_client(client)
    draw_server(server)
    for axes in (client, server):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="box")
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.savefig(Path(sys.argv[1]), dpi=170)


if __name__ == "__main__":
    main()
