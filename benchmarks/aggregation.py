"""Time, memory and exactness of aggregation rules against a streaming mean of the same tensors.

    pip install -r benchmarks/aggregation-requirements.txt     # optional: the peers
    python benchmarks/aggregation.py --out docs/results/aggregation

Every contestant is timed next to an in-place streaming mean, alternating, and reported as the median of the ratios:
what else the machine does then hits both. Times are CPU seconds of one thread, for the same reason. Objectives are
computed in float64 by this script and compared with the best point known. Memory is the rise of the peak resident set
(Linux only). Contestants that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fedeat
from fedeat import aggregation

MISTRAL_R8 = 32 * 8 * (2 * 4096 + 4096 + 1024)
"""Mistral-7B, rank 8 on q_proj and v_proj: 3.4 million."""
MISTRAL_R16 = 32 * 16 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
"""Mistral-7B, rank 16 on all linear layers: 42 million."""
GRID = [(n, d) for n in (10, 50, 100, 1000) for d in (100_000, 1_000_000, MISTRAL_R8, 10_000_000, MISTRAL_R16)]
SLOW = 2e8
"""Above so many numbers in all, the rules that take a hundred means and more are left out."""
ENOUGH = 0.5
"""Seconds that a contestant is timed for at least: of what takes milliseconds, three pairs tell little."""
QUICK = [(10, 100_000), (10, 1_000_000), (50, 1_000_000)]

Contestant = Callable[[], Tensor | dict[str, Tensor] | None]


@dataclass(frozen=True)
class Row:
    """One contestant on one instance.

    Attributes:
        clients: n.
        coordinates: d.
        attackers: share of clients that send -10 times their update.
        contestant: name.
        mean_s: CPU seconds of the streaming mean, median.
        ratio: contestant's time over the mean's, median of interleaved pairs.
        excess: objective over the best known, minus one; None where that was not computed.
        extra_bytes: rise of the peak resident set while it ran; None where the system does not tell.
    """

    clients: int
    coordinates: int
    attackers: float
    contestant: str
    mean_s: float
    ratio: float
    excess: float | None
    extra_bytes: int | None


def main() -> None:
    """Runs the grid and writes results.jsonl, table.md and plot.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for results.jsonl, table.md and plot.png")
    parser.add_argument("--quick", action="store_true", help="three small instances only, in seconds")
    parser.add_argument(
        "--repeats", type=int, default=5, help="interleaved pairs a contestant, more of one that takes milliseconds"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="run contestants whose first run takes longer only once"
    )
    parser.add_argument(
        "--memory", type=float, default=0.4, help="share of the memory that one copy of updates may take"
    )
    parser.add_argument("--tables-only", action="store_true", help="run nothing; table and plot from results.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if options.tables_only:
        rows = [Row(**json.loads(text)) for text in lines(options.out / "results.jsonl")[1:]]
        _show(rows, options.out)
        return
    with (options.out / "results.jsonl").open("w") as file:
        file.write(json.dumps(environment()) + "\n")
        for clients, coordinates in QUICK if options.quick else GRID:
            for attackers in (0.0, 0.2) if coordinates == 1_000_000 else (0.2,):
                for row in instance(clients, coordinates, attackers, options):
                    rows.append(row)
                    file.write(json.dumps(asdict(row)) + "\n")
                    file.flush()
                    print(line(row), flush=True)
    _show(rows, options.out)


def _show(rows: Sequence[Row], out: Path) -> None:
    (out / "table.md").write_text(table(rows))
    plot(rows, out / "plot.png")


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cpu = next((x.split(":")[1].strip() for x in lines("/proc/cpuinfo") if x.startswith("model name")), "unknown")
    return {
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
    }


def instance(clients: int, coordinates: int, attackers: float, options: argparse.Namespace) -> Iterator[Row]:
    """All contestants on one set of updates; nothing where it would not fit into memory."""
    if 4 * clients * coordinates > options.memory * total_memory():
        print(f"n={clients} d={coordinates}: left out, the updates alone take {4e-9 * clients * coordinates:.0f} GB")
        return
    generator = torch.Generator().manual_seed(clients + coordinates)
    matrix = torch.empty(clients, coordinates)
    common = torch.randn(coordinates, generator=generator)
    for client in range(clients):
        torch.randn(coordinates, generator=generator, out=matrix[client])
        matrix[client].add_(common).mul_(0.01 if client >= attackers * clients else -0.1)
    # A list of views costs no second copy of the largest instances; tensors of a real adapter are smaller still.
    adapters = [dict(pieces(row)) for row in matrix]
    with tempfile.TemporaryDirectory() as folder:
        paths = write(adapters, Path(folder))
        total = torch.empty(coordinates)

        def mean() -> Tensor:
            total.copy_(matrix[0])
            for client in range(1, clients):
                total.add_(matrix[client])
            return total.div_(clients)

        mean()
        reference = best_known(matrix)
        for name, contestant in contestants(matrix, adapters, paths).items():
            before = reset_peak()
            started = time.process_time()
            value = contestant()
            first = time.process_time() - started
            extra = None if before is None else max(0, peak() - before)
            repeats = max(options.repeats, int(ENOUGH / max(first, 1e-3))) if first < options.seconds else 0
            pairs = [(timed(mean), timed(contestant)) for _ in range(repeats)]
            if not pairs:
                pairs = [(timed(mean), first)]
            yield Row(
                clients,
                coordinates,
                attackers,
                name,
                statistics.median(base for base, _ in pairs),
                statistics.median(took / base for base, took in pairs),
                None
                if value is None or name.startswith(("mean", "coordinate", "trimmed"))
                else objective(matrix, joined(value)) / reference - 1,
                extra,
            )


def contestants(matrix: Tensor, adapters: Sequence[dict[str, Tensor]], paths: Sequence[Path]) -> dict[str, Contestant]:
    """Name -> function that returns the aggregate, as a vector or tensor by tensor."""
    secret = torch.Generator().manual_seed(0)
    found: dict[str, Contestant] = {
        "mean, torch.stack": lambda: torch.stack(list(matrix)).mean(0),
        "one matrix product a block": lambda: products_alone(matrix),
        "ours, matrix": lambda: fedeat.aggregate(matrix).value,
        "ours, list": lambda: fedeat.aggregate(adapters).value,
        "ours, files": lambda: fedeat.aggregate(paths).value,
        "ours, sampled": lambda: fedeat.aggregate(matrix, sample=secret).value,
    }
    if matrix.numel() > SLOW:
        return found
    found["coordinate median"] = lambda: fedeat.aggregate(matrix, rule=aggregation.coordinate_median).value
    found["trimmed mean"] = lambda: fedeat.aggregate(matrix, rule=aggregation.trimmed_mean).value
    try:
        from geom_median.torch import compute_geometric_median  # type: ignore[import-not-found]
    except ImportError:
        print("geom-median is not installed and left out", file=sys.stderr)
    else:
        found["geom-median"] = lambda: compute_geometric_median(list(matrix)).median
        found["geom-median, converged"] = lambda: (
            compute_geometric_median(list(matrix), eps=1e-12, maxiter=1000, ftol=1e-14).median
        )
    GeometricMedian = byzfl_median()
    if GeometricMedian is None:
        print("byzfl is not installed and left out", file=sys.stderr)
    else:
        found["byzfl"] = lambda: GeometricMedian()(matrix)
        found["byzfl, converged"] = lambda: GeometricMedian(nu=1e-9, T=50)(matrix)
    return found


def byzfl_median() -> Any:
    """The peer's class, or None where it is not installed."""
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None or spec.submodule_search_locations is None:
            return None
        # The package itself imports torchvision for its experiments; the aggregators need none of that.
        package = types.ModuleType("byzfl")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators.aggregators").GeometricMedian


def products_alone(matrix: Tensor) -> None:
    """The inner products alone, by one plain matrix product a block: what a BLAS pays for them."""
    for block in matrix.split(16384, dim=1):
        torch.mm(block, block.T)


def pieces(row: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One update as 64 tensors, views of the row."""
    for index, part in enumerate(torch.chunk(row, 64)):
        yield f"layers.{index:02d}.weight", part


def write(adapters: Sequence[dict[str, Tensor]], folder: Path) -> list[Path]:
    """One safetensors file a client."""
    from safetensors.torch import save_file

    paths = [folder / f"{client}.safetensors" for client in range(len(adapters))]
    for adapter, path in zip(adapters, paths, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, path)
    return paths


def best_known(matrix: Tensor) -> float:
    """The least objective known: that of our weights, polished by Weiszfeld's steps in float64 on whole updates."""
    weights = fedeat.aggregate(matrix).weights
    best = math.inf
    for _ in range(3):
        point = combined(matrix, weights)
        radii = distances(matrix, point)
        best = min(best, float(radii.mean()))
        weights = 1 / radii
        weights /= weights.sum()
    return best


def joined(value: Tensor | dict[str, Tensor]) -> Tensor:
    """An aggregate as one vector."""
    return value if isinstance(value, Tensor) else torch.cat([tensor.flatten() for tensor in value.values()])


def objective(matrix: Tensor, point: Tensor) -> float:
    """Mean distance of the updates from a point, in float64."""
    return float(distances(matrix, point.double()).mean())


def distances(matrix: Tensor, point: Tensor) -> Tensor:
    """(n,) float64 distances, one update at a time."""
    return torch.stack([torch.linalg.vector_norm(row.double() - point) for row in matrix])


def combined(matrix: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of updates in float64."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for weight, row in zip(weights.tolist(), matrix, strict=True):
        total.add_(row, alpha=weight)
    return total


def timed(function: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def reset_peak() -> int | None:
    """Resets the peak resident set to the present one and returns it, in bytes; None where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak()


def peak() -> int:
    """Peak resident set in bytes."""
    for text in lines("/proc/self/status"):
        if text.startswith("VmHWM:"):
            return int(text.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def lines(path: str | Path) -> list[str]:
    """Lines of a text file, none where it does not exist."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


HEADER = ["clients", "coordinates", "attackers", "rule", "mean", "time / mean", "objective excess", "extra memory"]


def line(row: Row) -> str:
    """One row as Markdown."""
    cells = [
        str(row.clients),
        f"{row.coordinates:,}",
        f"{row.attackers:.0%}",
        row.contestant,
        f"{row.mean_s * 1e3:.1f} ms",
        f"{row.ratio:.2f}",
        "-" if row.excess is None else f"{row.excess:.1e}",
        "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f} MiB",
    ]
    return "| " + " | ".join(cells) + " |"


def table(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table."""
    head = ["| " + " | ".join(HEADER) + " |", "| " + " | ".join(["---"] * len(HEADER)) + " |"]
    return "\n".join([*head, *map(line, rows)]) + "\n"


STYLES = {
    "ours, sampled": ("#0072b2", "-"),
    "ours, matrix": ("#56b4e9", "-"),
    "ours, list": ("#56b4e9", "--"),
    "ours, files": ("#56b4e9", ":"),
    "one matrix product a block": ("black", ":"),
    "mean, torch.stack": ("#009e73", "-"),
    "coordinate median": ("#cc79a7", "-"),
    "trimmed mean": ("#cc79a7", "--"),
    "geom-median": ("#d55e00", "-"),
    "geom-median, converged": ("#d55e00", "--"),
    "byzfl": ("#e69f00", "-"),
    "byzfl, converged": ("#e69f00", "--"),
}
"""Contestant -> color, which can be told apart without red and green, and line."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time against d and against n, log-log, with the floor that reading the updates twice sets."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    attacked = [row for row in rows if row.attackers > 0]
    names = [name for name in STYLES if any(row.contestant == name for row in attacked)]
    clients = sorted({row.clients for row in attacked})
    widths = sorted({row.coordinates for row in attacked})
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, variable, fixed, choice in (
        (left, "coordinates", "clients", clients[0]),
        (right, "clients", "coordinates", 1_000_000 if 1_000_000 in widths else widths[0]),
    ):
        chosen = [row for row in attacked if getattr(row, fixed) == choice]
        for name in names:
            points = sorted((getattr(r, variable), r.ratio * r.mean_s) for r in chosen if r.contestant == name)
            if not points:
                continue
            color, line = STYLES[name]
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker="o", markersize=4, label=name)
        floor = sorted({(getattr(r, variable), 2 * r.mean_s) for r in chosen if r.contestant == "ours, matrix"})
        axes.plot(*zip(*floor, strict=True), color="black", label="two readings (2 means)")
        axes.set(
            xscale="log", yscale="log", xlabel=variable, ylabel="CPU seconds, 1 thread", title=f"{fixed} = {choice:,}"
        )
        axes.grid(True, which="both", alpha=0.2)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
