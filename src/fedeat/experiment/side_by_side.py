"""Jobs side by side, each in a process that can fail, or be killed, without taking the others along."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from fedeat.errors import FedeatError, explanation

Value = TypeVar("Value")
Tell: TypeAlias = Callable[[str, int, int], None]
"""Called by a job with what it is doing, how much of it is done, and of how much."""
Job: TypeAlias = Callable[[Tell], Value]
"""What a process does; it travels there and its value back, so both must be picklable."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """How a job ended.

    Attributes:
        value: what it returned, None where it failed.
        failure: one line on why it failed, "" where it did not.
    """

    value: Value | None
    failure: str = ""


def run_jobs(
    jobs: Mapping[str, Job[Value]],
    *,
    processes: int,
    threads: int,
    tell: Callable[[str, str, int, int], None],
) -> Generator[tuple[str, Outcome[Value]], None, None]:
    """Runs jobs in fresh processes and yields each outcome as it comes.

    What a job writes to the log of this package is logged here, each line once. Closing the generator ends the
    processes; a caller that may be interrupted closes it (`contextlib.closing`).

    Args:
        jobs: by name.
        processes: >= 1, how many run at once.
        threads: >= 1, of torch in each.
        tell: told a job's name and what it is doing.
    """
    # Fresh interpreters: a fork would copy torch's thread pools in whatever state they are.
    context = multiprocessing.get_context("spawn")
    waiting = deque(jobs.items())
    busy: dict[Any, _Process] = {}
    idle: list[_Process] = []
    said: set[tuple[int, str]] = set()
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                process = idle.pop() if idle else _Process(context, threads)
                process.give(*waiting.popleft())
                busy[process.connection] = process
            for connection in wait(list(busy)):
                process = busy[connection]
                try:
                    kind, *content = process.connection.recv()
                except (EOFError, OSError):
                    del busy[connection]
                    yield process.job, Outcome(None, process.cause_of_death())
                    continue
                if kind == "progress":
                    tell(process.job, *content)
                elif kind == "log" and tuple(content) not in said:
                    said.add(tuple(content))
                    _log.log(content[0], "%s", content[1])
                elif kind == "outcome":
                    idle.append(busy.pop(connection))
                    yield process.job, content[0]
    finally:
        for process in (*busy.values(), *idle):
            process.end()


class _Process:
    """A process and the line to it."""

    def __init__(self, context: SpawnContext, threads: int) -> None:
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with _interrupts_held():  # Ctrl-C reaches the whole group; the child leaves it to this process
            self.process.start()
        theirs.close()
        self.job = ""

    def give(self, name: str, job: Job[Any]) -> None:
        self.job = name
        with contextlib.suppress(OSError):  # it died while idle: reading from it says so
            self.connection.send(job)

    def cause_of_death(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        if code < 0:
            hint = ", often for lack of memory" if -code == signal.SIGKILL else ""
            return f"its process was ended by signal {-code} ({signal.Signals(-code).name}){hint}"
        return f"its process ended with code {code}"

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, threads: int) -> None:
    """A process's life: take a job, do it, send how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _mask_interrupts(blocked=False)  # what came while it started is dropped
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    logging.getLogger("fedeat").addHandler(_SendLog(connection))
    logging.getLogger("fedeat").setLevel(logging.INFO)

    def tell(stage: str, done: int, total: int) -> None:
        connection.send(("progress", stage, done, total))

    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(("outcome", _attempt(job, tell)))


def _attempt(job: Job[Value], tell: Tell) -> Outcome[Value]:
    try:
        return Outcome(job(tell))
    except FedeatError as error:
        return Outcome(None, " ".join(str(error).split()))
    except Exception as error:  # a defect: it must not end the other jobs, and the line says where it is
        known = explanation(error)
        if known is not None:
            return Outcome(None, " ".join(known.split()))
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        return Outcome(None, f"{type(error).__name__}: {text} ({Path(where.filename).name}, line {where.lineno})")


def _end_with_parent() -> None:
    # A process whose parent was killed would go on, and hold the directory of its run.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _SendLog(logging.Handler):
    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.INFO)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(("log", record.levelno, record.getMessage()))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keeps Ctrl-C from a child that starts, which is born with it blocked, and from this process until it has started.

    Nothing is lost: one that came meanwhile is raised at the end.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    came: list[int] = []
    # A handler as well as a mask: another thread, such as a progress bar's, may take the signal for this process.
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    _mask_interrupts(blocked=True)
    try:
        yield
    finally:
        _mask_interrupts(blocked=False)
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _mask_interrupts(*, blocked: bool) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, {signal.SIGINT})
