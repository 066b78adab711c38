"""Federations that are killed at a chosen instant: a program that takes a JSON line a run on its stdin.

The package is imported once and each run is forked from there, so that killing one costs a fraction of a second. Keys:
"config" and "directory" of a run; "resume", to go on with it; "kill", a name in `INSTANTS` or the seconds after which
the run is killed; "count", at which time that instant comes (1, 2, ...). Replies with the run's exit status: 0
finished, -9 killed, else its error has gone to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedeat import evaluation, experiment, model, records
from fedeat.config import load
from fedeat.records import run_directory


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, count: int, *, before: bool, when: Callable[..., bool] = lambda *a: True) -> None:
    """Kills this process at the `count`-th call of a function, before or after it does its work."""
    original = getattr(owner, name)
    calls = 0

    def patched(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        fits = when(*arguments)
        calls += fits
        if fits and calls == count and before:
            die()
        result = original(*arguments, **options)
        if fits and calls == count:
            die()
        return result

    setattr(owner, name, patched)


def half_line(count: int) -> None:
    """Kills this process when half of a round's lines are on disk."""
    original, calls = records.RunDirectory.append_metrics, 0

    def patched(self: records.RunDirectory, lines: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            text = "".join(json.dumps(records.finite(line)) + "\n" for line in lines)
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(text[: len(text) // 2 + 3])
            die()
        original(self, lines)

    records.RunDirectory.append_metrics = patched  # type: ignore[method-assign]


def is_checkpoint(source: Path, target: Any) -> bool:
    return Path(target).name.startswith("round-")


HOME = records.RunDirectory
INSTANTS: dict[str, Callable[[int], None]] = {
    "before the records of a round": lambda n: around(HOME, "append_metrics", n, before=True),
    "within a line": half_line,
    "after the records of a round": lambda n: around(HOME, "append_timing", n, before=False),
    "after the adapter": lambda n: around(model.AdaptedModel, "save_adapter", n, before=False),
    "within a checkpoint": lambda n: around(run_directory, "save_file", n, before=False),
    "before the renaming": lambda n: around(pathlib.Path, "replace", n, before=True, when=is_checkpoint),
    "after the renaming": lambda n: around(pathlib.Path, "replace", n, before=False, when=is_checkpoint),
    "after the pruning": lambda n: around(HOME, "write_checkpoint", n, before=False),
    "before the evaluation": lambda n: around(evaluation, "evaluate", n, before=True),
    "after the evaluation": lambda n: around(evaluation, "evaluate", n, before=False),
}


def work(order: dict[str, Any]) -> None:
    if isinstance(order.get("kill"), str):
        INSTANTS[order["kill"]](order.get("count", 1))
    directory = Path(order["directory"])
    if order.get("resume"):
        experiment.resume(directory)
    else:
        experiment.run(load(Path(order["config"])), directory)


def job_that_dies(tell: object) -> None:
    """A job of `fedeat.experiment.side_by_side` whose process is killed."""
    die()


def job_with_a_defect(tell: object) -> float:
    """One that raises what nobody meant to raise."""
    return 1 / 0


def job_that_works(tell: Callable[[str, int, int], None]) -> int:
    """One that tells how far it is and returns."""
    tell("work", 1, 2)
    logging.getLogger("fedeat.test").warning("said once")
    return 3


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                work(order)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(2)
            os._exit(0)
        if isinstance(order.get("kill"), float):
            time.sleep(order["kill"])
            os.kill(child, signal.SIGKILL)  # not yet waited for, so still this child
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
