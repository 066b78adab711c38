"""Peak memory of the geometric median of many large updates that lie in files.

    python benchmarks/aggregation_memory.py --out docs/results/aggregation

By default 100 clients of 42 million parameters (Mistral-7B, rank 16 on all linear layers), which is 17 GB of
safetensors files in a temporary directory (--folder says where). A process of its own, which has read nothing else,
aggregates them; its peak resident set is the figure. Mapped files count in it as far as their pages are in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import fedeat
from aggregation import MISTRAL_R16, environment, peak, pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for memory.json")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--coordinates", type=int, default=MISTRAL_R16)
    parser.add_argument("--folder", type=Path, help="where the files lie for the time of the run")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure is not None:
        print(json.dumps(measured(sorted(given.measure.glob("*.safetensors")))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        write(Path(folder), given.clients, given.coordinates)
        command = [sys.executable, __file__, "--out", str(given.out), "--measure", folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    record = {"environment": environment(), "clients": given.clients, "coordinates": given.coordinates, **found}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def write(folder: Path, clients: int, coordinates: int) -> None:
    """One file a client: a common part, its own part, and a fifth of the clients ten times as large and opposite."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(coordinates, generator=generator)
    own = torch.empty(coordinates)
    for client in range(clients):
        torch.randn(coordinates, generator=generator, out=own)
        own.add_(common).mul_(0.01 if client >= clients // 5 else -0.1)
        save_file(dict(pieces(own)), folder / f"{client:03d}.safetensors")


def measured(paths: list[Path]) -> dict[str, float | int | bool]:
    """What one aggregation from these files took."""
    before = peak()
    began = time.monotonic()
    result = fedeat.aggregate(paths)
    return {
        "peak_bytes": peak(),
        "peak_bytes_before": before,
        "file_bytes": sum(path.stat().st_size for path in paths),
        "seconds": round(time.monotonic() - began, 1),
        "passes": result.passes,
        "gap": result.gap,
        "converged": result.converged,
    }


if __name__ == "__main__":
    main()
