"""Runs that are killed at a chosen instant, and one that was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Order: TypeAlias = Callable[..., int]
KILLED = -9
ROUNDS = 4


@pytest.fixture(scope="package")
def order() -> Iterator[Order]:
    """Has a run made by `killable.py` and returns its exit status."""
    program = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "killable.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert program.stdin is not None
    assert program.stdout is not None

    def give(**what: Any) -> int:
        program.stdin.write(json.dumps(what, default=str) + "\n")  # type: ignore[union-attr]
        program.stdin.flush()  # type: ignore[union-attr]
        return int(program.stdout.readline())  # type: ignore[union-attr]

    yield give
    program.stdin.close()
    program.wait(30)
    program.stdout.close()


@pytest.fixture
def config_file(make_config: Callable[..., Path]) -> Path:
    """A run in which all that is random or recorded takes part: dropout, cohorts, attackers, evaluation between."""
    return make_config(
        lora={"rank": 2, "dropout": 0.1},
        federation={"rounds": ROUNDS, "clients_per_round": 3, "keep_checkpoints": 2, "quorum": 1},
        perturbation={"start": "random"},
        attack={"kind": "nan", "fraction": 0.25},
        evaluation={"every": 2},
    )


@pytest.fixture
def stopped(order: Order, config_file: Path, tmp_path: Path) -> Path:
    """Directory of a run that was killed when its second round was nearly recorded."""
    directory = tmp_path / "stopped"
    assert order(config=config_file, directory=directory, kill="before the renaming", count=3) == KILLED
    return directory
