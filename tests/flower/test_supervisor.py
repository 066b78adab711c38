"""What dies is started again, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedeat.flower import supervisor as tested
from fedeat.flower.supervisor import Program, Supervisor

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)"]
PARENT = [sys.executable, "-c", f"import subprocess; subprocess.run({SLEEPER!r})"]

# The module as a file, whose import alone is quick.
SUPERVISING = f"""
import pathlib, runpy, time
found = runpy.run_path({tested.__file__!r})
supervisor = found["Supervisor"](pathlib.Path("."), print)
supervisor.start(found["Program"]("sleeper", {SLEEPER!r}))
print(supervisor.pid("sleeper"), flush=True)
time.sleep(1000)
"""


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_killed_is_started_again_and_all_end_together(tmp_path: Path) -> None:
    told: list[str] = []
    with Supervisor(tmp_path, told.append) as supervisor:
        supervisor.start(Program("sleeper", SLEEPER))
        first = supervisor.pid("sleeper")
        os.kill(first, signal.SIGKILL)
        died: list[str] = []

        def restarted() -> bool:
            died.extend(supervisor.look())
            return supervisor.pid("sleeper") != first

        until(restarted)
        assert died == ["sleeper"]
        assert told == [f"sleeper ended with signal 9; it is started again. Its output: {tmp_path / 'sleeper.log'}"]
        second = supervisor.pid("sleeper")
        assert supervisor.look() == []
    assert not alive(second)


@pytest.mark.skipif(sys.platform != "linux", reason="finds children through /proc")
def test_what_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    with Supervisor(tmp_path, lambda line: None) as supervisor:
        supervisor.start(Program("parent", PARENT))
        children = Path(f"/proc/{supervisor.pid('parent')}/task/{supervisor.pid('parent')}/children")
        until(lambda: bool(children.read_text().split()))
        child = int(children.read_text().split()[0])
    until(lambda: not alive(child))


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends the children of what was killed")
def test_a_supervisor_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISING]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        until(lambda: (tmp_path / "sleeper.log").read_text() == "up\n")
        process.kill()
    until(lambda: not alive(child))
