"""Keeps a few processes running: starts again what dies, and leaves none behind when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TERMINATE_S = 5.0
_LONGEST_PAUSE_S = 30.0
_SETTLED_S = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Program:
    """One process to keep running.

    Attributes:
        name: of its log file and in messages.
        command: what to run.
        environment: added to this process's.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Supervisor:
    """Runs programs until it is stopped; a context manager that ends them when it is left."""

    def __init__(self, logs: Path, tell: Callable[[str], None]) -> None:
        """A supervisor without programs.

        Args:
            logs: directory of their output, one file a program.
            tell: told in a line what starts and what died.
        """
        self._logs = logs
        self._tell = tell
        self._running: dict[str, _Running] = {}

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *ending: object) -> None:
        self.stop()

    def start(self, program: Program) -> None:
        """Starts a program and keeps it running from now on."""
        self._running[program.name] = _Running(program, self._launch(program))

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._logs / f"{name}.log"

    def pid(self, name: str) -> int:
        """The process that a program has now."""
        return self._running[name].process.pid

    def look(self) -> list[str]:
        """Starts again what has died; the names of what had."""
        died = []
        for name, running in self._running.items():
            code = running.process.poll()
            if code is None:
                continue
            now = time.monotonic()
            if running.restart_at is None:
                died.append(name)
                quick = now - running.started < _SETTLED_S
                running.pause = min(_LONGEST_PAUSE_S, 2 * running.pause) if quick else 1.0
                running.restart_at = now + (running.pause if running.deaths else 0.0)
                running.deaths += 1
                _end_group(running.process, signal.SIGKILL)  # what it had started serves nobody now
                cause = f"signal {-code}" if code < 0 else f"code {code}"
                self._tell(f"{name} ended with {cause}; it is started again. Its output: {self.log(name)}")
            if now >= running.restart_at:
                running.process, running.started, running.restart_at = self._launch(running.program), now, None
        return died

    def stop(self) -> None:
        """Ends all programs and what they have started."""
        processes = [running.process for running in self._running.values()]
        for process in processes[::-1]:
            _end_group(process, signal.SIGTERM)
        deadline = time.monotonic() + _TERMINATE_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            _end_group(process, signal.SIGKILL)
            process.wait()
        self._running.clear()

    def _launch(self, program: Program) -> subprocess.Popen[bytes]:
        with self.log(program.name).open("ab") as output:
            # A group of its own: Ctrl-C reaches this process alone, which ends the others in order.
            return subprocess.Popen(
                list(program.command),
                env={**os.environ, **program.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )


@dataclass
class _Running:
    program: Program
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    deaths: int = 0
    pause: float = 0.5
    restart_at: float | None = None


def die_with_parent() -> None:
    """Has the system end this process when its parent ends, however that happens; does nothing but on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask for an orderly end; yields whether one has come."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
