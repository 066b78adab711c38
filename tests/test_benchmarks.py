"""The client step's benchmark at its smallest: every contestant runs, and its counts and bounds are right."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def client_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("client_step")


OPTIONS = Namespace(
    device="cpu", batches=2, batch_size=2, rounds=1, length=0.3, steps=[1, 10], quick=True, no_compile=True
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it forks to measure memory
def test_every_step_of_the_benchmark_runs_and_is_compared(client_step: Any) -> None:
    rows = list(client_step.measure("tiny", "alpaca", OPTIONS))
    names = [row.contestant for row in rows]
    assert len(names) == len(set(names))
    expected = {"ordinary", "naive K=3", "reference manner, K=3", "plain", "K=1", "K=3, bf16 ascent", "FreeLB K=3"}
    assert expected <= set(names)
    by_name = {row.contestant: row for row in rows}
    assert by_name["ordinary"].ratio == by_name["ordinary"].low == by_name["ordinary"].high == 1.0
    assert by_name["plain"].own == 1.0
    assert all(row.seconds > 0 and row.tokens_per_s > 0 for row in rows)
    rows += client_step.epoch("tiny", OPTIONS)
    bounds = client_step.criteria(rows)
    assert [bound.bound for bound in bounds].count("at least 2.3") == 4
    text = client_step.table(rows, bounds, {"command": "x"})
    assert "| naive K=3 |" in text
    assert "| tiny | K=10 over one's own plain step, float32 | " in text


def test_bounds_are_met_on_the_right_side(client_step: Any) -> None:
    def row(task: str, contestant: str, ratio: float) -> Any:
        return client_step.Row("m3", task, contestant, 1.0, ratio, ratio, ratio, ratio, 1.0, None, None)

    rows = [row("alpaca", "K=10", 9.9), row("alpaca", "K=3, bf16 ascent", 1.8)]
    rows += [row("epoch", "naive K=3", 4.6), row("epoch", "K=3", 2.0)]
    rows += [row("clients, 1 x 48", "8 clients, one by one", 1.0), row("clients, 1 x 48", "8 clients at once", 0.6)]
    found = [(bound.bound, round(bound.found, 2), bound.met) for bound in client_step.criteria(rows)]
    assert found == [
        ("at most 9.8", 9.9, False),
        ("at most 1.9", 1.8, True),
        ("at least 2.3", 2.3, True),
        ("at least 1.8", 1.67, False),
    ]
