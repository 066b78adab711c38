"""The client step's benchmark at its smallest: every contestant runs, and the counts it reports are right."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def client_step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("client_step", BENCHMARKS / "client_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["client_step"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


OPTIONS = Namespace(device="cpu", batches=1, batch_size=2, rounds=1, length=0.3, steps=[1], quick=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it forks to measure memory
def test_every_step_of_the_benchmark_runs_and_is_compared(client_step: ModuleType) -> None:
    rows = list(client_step.measure("tiny", "cls", OPTIONS))
    names = [row.contestant for row in rows]
    assert len(names) == len(set(names))
    assert {"ordinary", "naive K=3", "plain", "K=1", "K=3, bf16 ascent", "FreeLB K=3", "YOPO 2 x 3"} <= set(names)
    assert next(row for row in rows if row.contestant == "ordinary").ratio == 1.0
    assert next(row for row in rows if row.contestant == "plain").own == 1.0
    assert all(row.seconds > 0 and row.tokens_per_s > 0 for row in rows)
    assert "| naive K=3 |" in client_step.table(rows, {"command": "x"})
