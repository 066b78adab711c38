"""A job of three clients and three rounds in one process, in Flower's simulation and in a deployment.

    python benchmarks/deployment.py --out docs/results/deployment                # minutes, on a quiet machine
    python benchmarks/deployment.py --out OUT --quick                            # two steps a round
    python benchmarks/deployment.py --out OUT --set secure_aggregation.enabled=true

The deployment is `fedeat serve` and three `fedeat join` on loopback with TLS and node keys; each node's worker loads
the base model once. Seconds are those of the rounds as the run's records have them, from the first order to train to
the last checkpoint; start-up (imports, loading the model, connecting) is beside them. Memory is the highest resident
set of each process, as the system keeps it, read twice a second; what a process does after the last reading is missed.
All runs must end in the same adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedeat import demo

CLIENTS, ROUNDS = 3, 3
ENGINES = ("in process", "simulation", "deployment")
ROLES = {
    "fedeat.flower.worker": "worker",
    "flwr-serverapp": "ServerApp",
    "fedeat.flower.superlink": "SuperLink",
    "supernode.py": "SuperNode",
    "flower-superexec": "SuperExec",
    "ray::": "simulated client",
    "raylet": "Ray",
    "gcs_server": "Ray",
    "-m fedeat run": "run",
    "-m fedeat join": "join",
    "-m fedeat serve": "serve",
}
"""What a command line holds -> what the process is."""


def main() -> None:
    """Runs each engine in turn and writes results.json and table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json and table.md")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of a client in a round")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each engine, in turn")
    parser.add_argument("--quick", action="store_true", help="two steps, one repeat")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats = 2, 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedeat-bench-") as name:
        place = Path(name)
        config = write_job(place, options.steps)
        nodes: Sequence[str] = ()
        with contextlib.ExitStack() as stack:
            if "deployment" in options.engines:
                nodes = stack.enter_context(deployed(place))
            for repeat in range(options.repeats):
                for engine in options.engines:
                    rows.append(measured(engine, place, config, nodes, options.overrides, repeat))
                    print(json.dumps(rows[-1]), flush=True)
    digests = {row["adapter"] for row in rows}
    if len(digests) > 1:
        raise SystemExit(f"the engines ended in different adapters: {digests}")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(options), "rows": rows}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.out / "table.md").write_text(table(record), encoding="utf-8")
    print(table(record))


def write_job(place: Path, steps: int) -> Path:
    """The demo's small world, a task a client, on the small model that ships along."""
    data = demo.write_data(place / "data", seed=demo.SEED, train=300, test=20, pairs=10)
    settings = {
        "threads": 1,
        "model": {"name": str(demo.MODEL), "device": "cpu"},
        "lora": {"rank": 8, "alpha": 32.0},
        "data": {"train": sorted(map(str, data.train))[:CLIENTS], "template": "plain", "max_length": 128},
        "partition": {"kind": "file"},
        "federation": {"rounds": ROUNDS, "quorum": CLIENTS},
        "client": {
            "batch_size": 12,
            "max_steps": steps,
            "local_epochs": 9,
            "clients_per_batch": 1,
        },
        "perturbation": {"radius": 0.1, "steps": 3},
    }
    path = place / "config.toml"
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return path


@contextlib.contextmanager
def deployed(place: Path) -> Iterator[Sequence[str]]:
    """A server and three nodes until the context ends; what `fedeat run` needs to reach them."""
    keys, port = place / "keys", free_port()
    names = [f"node{i}" for i in range(CLIENTS)]
    subprocess.run(
        fedeat("keys", "--out", keys, "--server", *(part for name in names for part in ("--node", name))),
        check=True,
        capture_output=True,
    )
    address = f"127.0.0.1:{port}"
    started = [start(place, "serve", fedeat("serve", "--keys", keys, "--port", port, "--state", place / "server"))]
    try:
        for name, file in zip(names, sorted((place / "data").glob("train-*")), strict=False):
            secret = ("--key", keys / f"{name}.key", "--ca", keys / "ca.pem")
            node = fedeat("join", "--superlink", address, *secret, "--data", file, "--state", place / name)
            started.append(start(place, name, node))
            # One after the other, so that clients are numbered as in the configuration.
            while "joined" not in (place / f"{name}.log").read_text():
                if started[-1].poll() is not None or started[0].poll() is not None:
                    raise SystemExit(f"a node or the server ended:\n{(place / f'{name}.log').read_text()[-2000:]}")
                time.sleep(0.1)
        yield ("--engine", "flower", "--superlink", address, "--keys", str(keys))
    finally:
        for process in started[::-1]:
            process.terminate()
        for process in started:
            process.wait(60)


def measured(
    engine: str, place: Path, config: Path, nodes: Sequence[str], overrides: Sequence[str], repeat: int
) -> dict[str, Any]:
    """One run: its seconds, and the memory of its processes and of the deployment's."""
    directory = place / f"{engine.replace(' ', '-')}-{repeat}"
    words = {"in process": (), "simulation": ("--engine", "flower-simulation"), "deployment": nodes}[engine]
    sets = [part for override in overrides for part in ("--set", override)]
    command = fedeat("run", config, *words, *sets, "--out", directory)
    with peaks(engine == "deployment") as found:
        began = time.monotonic()
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        wall = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{engine} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (directory / "timings.jsonl").read_text().splitlines()]
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "engine": engine,
        "repeat": repeat,
        "rounds_s": sum(line["seconds"] for line in lines),
        "wall_s": wall,
        "adapter": hashlib.sha256(adapter).hexdigest(),
        "peak_mib": {role: round(size / 1024) for role, size in sorted(found.items())},
    }


@contextlib.contextmanager
def peaks(with_nodes: bool) -> Iterator[dict[str, int]]:
    """Role -> the highest resident set in KiB of any process of that role that descends from this one."""
    found: dict[str, int] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.5):
            for number in descendants(os.getpid()):
                role, size = described(number)
                if role and (with_nodes or role in ("run", "simulated client", "Ray")):
                    found[role] = max(found.get(role, 0), size)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()


def descendants(ancestor: int) -> list[int]:
    """Numbers of the processes that a process started, and of those that they started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found, waiting = [], [ancestor]
    while waiting:
        above = waiting.pop()
        below = [number for number, parent in parents.items() if parent == above]
        found += below
        waiting += below
    return found


def described(number: int) -> tuple[str, int]:
    """A process's role, "" for none of ours, and its highest resident set in KiB."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = (Path("/proc") / str(number) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        status = (Path("/proc") / str(number) / "status").read_text()
        role = next((role for mark, role in ROLES.items() if mark in words), "")
        return role, int(status.split("VmHWM:")[1].split()[0])
    return "", 0


def table(record: dict[str, Any]) -> str:
    """Markdown: medians over the repeats, and the job they are of."""
    rows, told = record["rows"], record["environment"]
    lines = [f"`{told['command']}`", "", ", ".join(f"{key} {value}" for key, value in told.items() if key != "command")]
    lines += ["", "| engine | rounds, s | of one process | whole command, s | peak resident MiB |"]
    lines += ["| --- | ---: | ---: | ---: | --- |"]
    base = {row["repeat"]: row["rounds_s"] for row in rows if row["engine"] == "in process"}
    for engine in dict.fromkeys(row["engine"] for row in rows):
        mine = [row for row in rows if row["engine"] == engine]
        ratios = [row["rounds_s"] / base[row["repeat"]] for row in mine if row["repeat"] in base]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
        peak = {role: max(row["peak_mib"].get(role, 0) for row in mine) for row in mine for role in row["peak_mib"]}
        lines.append(
            f"| {engine} | {statistics.median(row['rounds_s'] for row in mine):.1f} | {ratio} "
            f"| {statistics.median(row['wall_s'] for row in mine):.1f} "
            f"| {', '.join(f'{role} {size}' for role, size in sorted(peak.items()))} |"
        )
    return "\n".join(lines) + "\n"


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "command": "python benchmarks/deployment.py " + " ".join(sys.argv[1:]),
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "steps": options.steps,
        "repeats": options.repeats,
        "cores": os.cpu_count(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """Its name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fedeat(*words: object) -> list[str]:
    """The command line of this environment."""
    return [sys.executable, "-m", "fedeat", *map(str, words)]


def start(place: Path, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A background command with a log."""
    with (place / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=place, stdout=log, stderr=subprocess.STDOUT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
