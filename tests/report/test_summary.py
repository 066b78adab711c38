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


def test_no_rows_say_so() -> None:
    assert summary([]) == "Nothing has been evaluated yet."


def test_the_base_model_alone_gets_a_sentence(new_row: NewRow) -> None:
    assert "The base model alone answers" in summary([new_row("base", "none", "sst2", 0)])
