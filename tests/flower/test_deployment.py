"""A server and three nodes on this machine, as a person starts them: who is let in, what is killed, what comes out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000")
SECONDS = 400.0


def fedeat(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedeat", *map(str, words)]


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def until(
    happened: Callable[[], Any],
    what: str,
    alive: subprocess.Popen[bytes] | None = None,
    said: Callable[[], str] = str,
) -> None:
    """Waits for something; gives up after a time that suffices on a busy machine."""
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen"
        assert alive is None or alive.poll() is None, f"the process ended before {what}:\n{said()}"
        time.sleep(0.1)


class Place:
    """A directory with the logs of background commands, which are ended when the test is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.path / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=self.path, stdout=log, stderr=subprocess.STDOUT)
        self.running.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text(errors="replace")

    def rounds(self, run: str) -> int:
        file = self.path / run / "timings.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def end(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.running:
            process.wait(60)


def busy(place: Place, name: str) -> bool:
    """Whether a node's worker has an order that it has not carried out yet."""
    log = (place.path / f"node-{name}" / "worker.log").read_text(errors="replace")
    return log.count("order taken") > log.count("order carried out")


def rounds_of(directory: Path) -> list[dict[str, Any]]:
    """The rounds' lines of a run's records."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "round"]


def family(mark: str) -> dict[int, str]:
    """Processes whose command line holds `mark`: number -> command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if mark in words:
                    found[int(entry.name)] = words
    return found


def kill(mark: str, program: str) -> None:
    """kill -9 of the one process of this test that runs `program`."""
    victims = [number for number, words in family(mark).items() if program in words]
    assert victims, f"no {program} to kill"
    os.kill(victims[0], signal.SIGKILL)


def listeners(processes: Sequence[int]) -> set[str]:
    """Local addresses, in hexadecimal, at which these processes listen."""
    inodes = set()
    for number in processes:
        with contextlib.suppress(OSError):
            for link in (Path("/proc") / str(number) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(link))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and f"socket:[{words[9]}]" in inodes:
                found.add(words[1].split(":")[0])
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.end()
    until(lambda: not family(str(tmp_path)), "the end of all processes")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes and sockets through /proc")
def test_a_deployment_lets_in_whom_it_knows_and_survives_kills_to_the_same_bits(
    place: Place, language_model: Path, sentiment_files: dict[str, Path]
) -> None:
    # Three silos of a file each, and the run in one process that a deployment must equal.
    rows = sentiment_files["train"].read_text().splitlines(keepends=True)
    files = [place.path / f"silo{i}.jsonl" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text("".join(rows[i::3]))
    settings: dict[str, Any] = {
        "threads": 1,
        "model": {"name": str(language_model), "device": "cpu"},
        "lora": {"rank": 2},
        "data": {"train": [str(file) for file in files], "template": "plain", "max_length": 64},
        "partition": {"kind": "file"},
        "federation": {"rounds": 3, "quorum": 3},
        "client": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "clients_per_batch": 1},
        "perturbation": {"steps": 1},
        "communication": {"encoding": "int8"},
    }
    config = place.path / "config.toml"
    config.write_text(tomli_w.dumps(settings))
    subprocess.run(fedeat("run", config, "--out", place.path / "here"), check=True, capture_output=True)

    keys, stranger = place.path / "keys", place.path / "stranger"
    names = ["a", "b", "c"]
    made = [part for name in names for part in ("--node", name)]
    subprocess.run(fedeat("keys", "--out", keys, "--server", *made), check=True, capture_output=True)
    subprocess.run(fedeat("keys", "--out", stranger, "--server", "--node", "x"), check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    state = place.path / "server"
    server = place.start("serve", fedeat("serve", "--keys", keys, "--port", str(port), "--state", state))
    for name, file in zip(names, files, strict=True):
        secret = ["--key", keys / f"{name}.key", "--ca", keys / "ca.pem"]
        node = ["join", "--superlink", address, *secret, "--data", file, "--state", place.path / f"node-{name}"]
        place.start(f"join-{name}", fedeat(*node))
    for name in names:
        until(lambda name=name: "joined" in place.said(f"join-{name}"), f"{name} joins", server)

    # A wrong authority and plaintext are refused at once; an unknown key is told so and may try again.
    join = fedeat("join", "--superlink", address, "--data", files[0])
    wrong = [*join, "--key", f"{stranger}/x.key", "--ca", f"{stranger}/ca.pem", "--state", f"{place.path}/wrong"]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is refused: its certificate was not signed by" in " ".join(done.stderr.split())
    plain = [*join, "--insecure", "--state", f"{place.path}/plain"]
    done = subprocess.run(plain, capture_output=True, text=True)
    assert done.returncode == 2
    assert "speaks TLS: plaintext is refused" in " ".join(done.stderr.split())
    unknown = [*join, "--key", f"{stranger}/x.key", "--ca", f"{keys}/ca.pem", "--state", f"{place.path}/unknown"]
    intruder = place.start("unknown", unknown)
    until(lambda: "refuses this node: it does not know its key" in place.said("unknown"), "the refusal", intruder)
    intruder.send_signal(signal.SIGTERM)
    assert intruder.wait(60) == 0

    # The server listens on this machine alone, a node on no network; and a worker's socket is its owner's.
    assert listeners(list(family(str(place.path)))) <= set(LOOPBACK)
    assert not listeners([*family(str(keys / "a.key")), *family(str(place.path / "node-a"))])
    assert stat.S_IMODE((place.path / "node-a").stat().st_mode) == 0o700
    for entry in (place.path / "node-a").glob("worker.sock"):
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600

    # kill -9 of a worker, then of the SuperLink: the run goes on by itself, with the bits of one that was not killed.
    on_nodes = ["--engine", "flower", "--superlink", address, "--keys", keys]
    run = place.start("run", fedeat("run", config, *on_nodes, "--out", place.path / "there"))
    until(lambda: place.rounds("there") >= 1, "the first round", run)
    kill(str(place.path), "fedeat.flower.worker")
    until(lambda: place.rounds("there") >= 2, "the second round", run)
    kill(str(place.path), "fedeat.flower.superlink")
    assert run.wait(SECONDS) == 0, place.said("run")
    assert digest(place.path / "there") == digest(place.path / "here")
    metrics = [(place.path / name / "metrics.jsonl").read_bytes() for name in ("here", "there")]
    assert metrics[0] == metrics[1]

    # kill -9 of the ServerApp: the same command goes on from the last finished round.
    shutil.rmtree(place.path / "there")
    run = place.start("again", fedeat("run", config, *on_nodes, "--out", place.path / "there"))
    until(lambda: place.rounds("there") >= 1, "the first round", run, lambda: place.said("again"))
    kill(str(place.path), "flwr-serverapp")
    run.wait(SECONDS)
    subprocess.run(fedeat("run", config, *on_nodes, "--out", place.path / "there"), check=True, capture_output=True)
    assert digest(place.path / "there") == digest(place.path / "here")

    # kill -9 of a SuperNode in the middle of a round: the run ends by itself, the cohort stays, who missed it is named.
    changes = {"federation.quorum": 2, "communication.grace_s": 3.0, "client.max_steps": 20, "client.local_epochs": 9}
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    run = place.start("third", fedeat("run", config, *sets, *on_nodes, "--out", place.path / "without"))
    until(lambda: place.rounds("without") >= 1, "the first round", run)
    until(lambda: busy(place, "b"), "an order to train", run)
    kill(str(keys / "b.key"), "supernode.py")
    assert run.wait(SECONDS) == 0, place.said("third")
    rounds = rounds_of(place.path / "without")
    assert [line["cohort"] for line in rounds] == [[0, 1, 2]] * 3
    assert all({0, 2} <= set(line["accepted"]) for line in rounds)
    assert {item["client"] for line in rounds for item in line["rejected"]} <= {1}
    assert "supernode ended with signal 9; it is started again" in " ".join(place.said("join-b").split())
