"""Tables of results as Markdown: the same figures and the same bold as on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedeat.report.cells import Condition, read_rows
from fedeat.report.differences import compare_runs, condition_costs
from fedeat.report.markdown import condition_tables, cost_tables, findings, task_tables
from fedeat.report.reading import Records, merge, read_directory, read_records
from fedeat.report.tables import ResultTable, percent, result_tables

NewRow = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def records(comparison: Path) -> Records:
    return read_directory(comparison)


@pytest.fixture(scope="module")
def tables(records: Records) -> list[ResultTable]:
    return result_tables(records.rows, compare_runs(records.rows, records.runs))


def test_a_condition_has_a_table_with_the_same_figures_bold_and_flags(tables: list[ResultTable]) -> None:
    text = condition_tables(tables)
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        "### No malicious clients",
        "### Sign flip, 30 % malicious clients",
    ]
    _, _, attacked = text.partition("### Sign flip")
    cell = tables[1].cells["gm", "sst2"]
    assert f"**{percent(cell.accuracy.mean)}** [" in attacked
    accuracy, asr = (line for line in attacked.splitlines() if line.startswith("| EAT |"))
    assert len(tables[1].tasks) > 2
    for line in (accuracy, asr):
        assert len(line.split("|")) == len(tables[1].tasks) + 3
        assert "†" in line.split("|")[2]
        assert "**" not in line
    assert "(0/" not in accuracy
    assert "(0/" in asr
    assert "1 seed a cell." in attacked
    assert "† EAT: sst2 (constant prediction: 98 % positive)" in attacked


def test_one_task_has_accuracy_and_asr_side_by_side(new_row: NewRow) -> None:
    text = condition_tables(result_tables(read_rows([new_row("gm", "none", "sst2", 0)])[0]))
    assert "| method | sst2 accuracy | sst2 ASR |" in text
    assert len([line for line in text.splitlines() if line.startswith("| GM |")]) == 1


def test_many_conditions_make_two_tables_a_task(tables: list[ResultTable]) -> None:
    text = task_tables(tables)
    heads = [f"### {task}, {measure}" for task in tables[0].tasks for measure in ("accuracy", "ASR")]
    assert [line for line in text.splitlines() if line.startswith("### ")] == heads
    lines = [line for line in text.splitlines() if line.startswith("| Sign flip, 30 % malicious clients |")]
    assert len(lines) == len(heads)
    assert ["/" in line for line in lines] == [head.endswith("ASR") for head in heads]  # counts of pairs
    assert "**Sign flip, 30 % malicious clients.** 1 seed a cell." in text


def test_the_tables_of_a_task_have_only_what_was_run_on_it(new_row: NewRow) -> None:
    ran = [("fedavg", "none"), ("gm", "none"), ("gm", "alie"), ("eat", "mimic"), ("gm", "mimic"), ("gm", "ipm")]
    rows = [new_row(method, attack, "sst2", 0) for method, attack in ran]
    rows += [new_row("fedavg", attack, "qqp", 0) for attack in ("none", "mimic")]
    text = task_tables(result_tables(read_rows(rows)[0]))
    _, _, both = text.partition("### sst2, accuracy")
    sst2, _, qqp = both.partition("### qqp, accuracy")
    assert "|  | FedAvg | EAT | GM |" in sst2
    assert sst2.count("| ALIE, 30 % malicious clients |") == 2
    assert "|  | FedAvg |" in qqp
    assert "|  | FedAvg | " not in qqp
    assert "| ALIE" not in qqp
    assert qqp.count("| Mimic, 30 % malicious clients |") == 2


def test_what_an_attack_costs_is_tested_on_the_same_texts(records: Records) -> None:
    costs = condition_costs(records.rows, records.runs)
    assert {condition for condition, _, _ in costs} == {Condition("sign_flip", 0.3)}
    assert {method for _, method, _ in costs} == {"fedavg", "eat", "gm", "fedeat"}
    broken = {(method, item.task): item for _, method, item in costs}["fedavg", "sst2"]
    assert broken.significant
    assert broken.value < -0.2
    assert broken.first == "sign_flip-0.3"
    assert f"**{100 * broken.value:+.1f}** [" in cost_tables(costs)


def test_findings_are_the_sentences_of_the_page(tables: list[ResultTable], records: Records) -> None:
    text = findings(tables, records.rows)
    assert "- GM has higher accuracy than FedAvg" in text
    assert "One seed was run" in text
    assert "McNemar" in text
    assert "- No difference between two methods." in findings(result_tables(records.rows), records.rows)


def test_cells_of_a_grid_that_is_not_finished_say_their_seeds(new_row: NewRow) -> None:
    rows = [new_row("gm", "none", "sst2", seed) for seed in range(3)] + [new_row("fedavg", "none", "sst2", 0)]
    rows += [new_row("base", "none", "sst2", 0)]
    text = condition_tables(result_tables(read_rows(rows)[0]))
    by_method = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert ", 3 seeds" in by_method["GM"]
    assert ", 1 seed |" in by_method["FedAvg"]
    assert "seed" not in by_method["Base model"]
    assert "1 to 3 seeds a cell." in text


def test_federations_of_a_task_each_make_one_table(tmp_path: Path, new_run: Callable[..., None]) -> None:
    for task in ("sst2", "qqp"):
        new_run(tmp_path / task / "runs" / "gm-none", "gm", "none")
        file = tmp_path / task / "runs" / "gm-none" / "evaluation.json"
        stored = json.loads(file.read_text())
        file.write_text(json.dumps({**stored, "rows": [row for row in stored["rows"] if row["task"] == task]}))
    records = merge([read_records(tmp_path / task) for task in ("sst2", "qqp")])
    (table,) = result_tables(records.rows)
    assert (table.methods, table.tasks) == (("gm",), ("sst2", "qqp"))
    assert [run.name for run in records.runs] == ["sst2-gm-none", "qqp-gm-none"]
