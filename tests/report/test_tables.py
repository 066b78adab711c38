"""The result tables in the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from fedeat.report import print_tables
from fedeat.report.cells import read_rows
from fedeat.report.tables import result_tables, table_csv, write_csv

NewRow = Callable[..., dict[str, Any]]


def printed(rows: list[dict[str, Any]], width: int = 100, *, colour: bool = False) -> str:
    stream = io.StringIO()
    print_tables(rows, Console(file=stream, width=width, force_terminal=colour, color_system=None))
    return stream.getvalue()


def test_one_table_a_condition_with_the_base_first(rows: list[dict[str, Any]]) -> None:
    lines = printed(rows).splitlines()
    assert [line for line in lines if line.startswith("Table")] == [
        "Table 1. No malicious clients",
        "Table 2. Sign flip, 30 % malicious clients",
    ]
    names = [line.split("  ")[0] for line in lines if line[:1].isalpha()]
    assert names[2:7] == ["Base model", "FedAvg", "EAT", "GM", "FedEAT"]


def test_counts_stand_under_the_attack_success_rate(new_row: NewRow) -> None:
    row = new_row("gm", "none", "sst2", 0)
    assert f"{row['broken']}/{row['benign_correct']}" in printed([row])


def test_a_flagged_value_is_marked_and_never_bold(new_row: NewRow) -> None:
    flagged = new_row("eat", "none", "sst2", 0, accuracy=0.95, asr=0.0, flags=["constant prediction: 98 % positive"])
    text = printed([flagged, new_row("gm", "none", "sst2", 0, accuracy=0.6)], colour=True)
    assert "95.0†" in text
    assert "† EAT: sst2 (constant prediction: 98 % positive)" in text
    assert "\x1b[1m95.0" not in text
    assert "\x1b[1m 95.0" not in text


def test_an_undefined_rate_is_named_so(new_row: NewRow) -> None:
    assert "n/a" in printed([new_row("gm", "none", "sst2", 0) | {"asr": None, "asr_low": None, "asr_high": None}])


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(rows: list[dict[str, Any]], width: int) -> None:
    assert max(len(line) for line in printed(rows, width).splitlines()) <= width


def test_a_method_named_like_markup_prints_as_it_is(new_row: NewRow) -> None:
    assert "[red]x[/nope]" in printed([new_row("gm", "none", "sst2", 0) | {"method": "[red]x[/nope]"}])


def test_spread_over_seeds_is_shown(new_row: NewRow) -> None:
    rows = [new_row("gm", "none", "sst2", seed, accuracy=0.8 + 0.1 * seed) for seed in (0, 1)]
    assert "±7.1" in printed(rows)


def test_no_rows_print_a_sentence() -> None:
    assert printed([]) == "No results yet.\n"


def test_csv_holds_one_line_a_method_and_task(rows: list[dict[str, Any]]) -> None:
    known, _ = read_rows(rows)
    table = result_tables(known)[1]
    lines = list(csv.DictReader(io.StringIO(table_csv([table]))))
    assert len(lines) == 5 * 4
    line = next(line for line in lines if line["method"] == "eat" and line["task"] == "sst2")
    assert line["flags"] == "constant prediction: 98 % positive"
    assert float(line["byzantine_fraction"]) == 0.3


def test_csv_cells_are_not_run_as_formulas() -> None:
    assert write_csv(("a", "b"), [("=1+1", -2)]) == "a,b\n'=1+1,-2\n"
