"""The paragraph in plain words says what the methods reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedeat.report.cells import read_rows
from fedeat.report.summary import summarise
from fedeat.report.tables import result_tables

NewRow = Callable[..., dict[str, Any]]


def summary(rows: list[dict[str, Any]]) -> str:
    return " ".join(summarise(result_tables(read_rows(rows)[0])))


def test_collapsed_and_standing_methods_are_named(rows: list[dict[str, Any]]) -> None:
    text = summary(rows)
    collapsed, standing = text.split("clearly lose accuracy on every task")
    assert "FedAvg (from" in collapsed
    assert "EAT (from" in collapsed
    assert "for GM (from" in standing
    assert "no task shows a loss beyond its interval" in standing


def test_means_are_over_tasks_that_all_have(new_row: NewRow) -> None:
    rows = [new_row("fedavg", "none", "sst2", 0, accuracy=0.9), new_row("fedavg", "none", "mnli", 0, accuracy=0.6)]
    rows += [new_row("gm", "none", "sst2", 0, accuracy=0.88), new_row("fedavg", "ipm", "sst2", 0, accuracy=0.5)]
    free, attacked = summarise(result_tables(read_rows(rows)[0]))
    assert "on the one task that all have, is FedAvg 90.0 % and GM 88.0 %" in free.replace(", GM", " and GM")
    assert "FedAvg (from 90.0 to 50.0 %)" in attacked
    assert attacked.endswith("(on one task).")
    apart = [new_row("fedavg", "none", "sst2", 0), new_row("gm", "none", "mnli", 0)]
    assert summary(apart) == ""


def test_no_rows_say_so() -> None:
    assert summary([]) == "Nothing has been evaluated yet."


def test_the_base_model_alone_gets_a_sentence(new_row: NewRow) -> None:
    assert "The base model alone answers" in summary([new_row("base", "none", "sst2", 0)])
