"""Records are read whatever a killed or running process left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedeat.errors import RecordError
from fedeat.report.reading import Records, merge, read_directory, read_records, read_run

NewRun = Callable[..., None]


def test_a_finished_run_needs_no_note(run_directory: Path) -> None:
    run = read_run(run_directory)
    assert run.notes == ()
    assert (run.method, run.attack, run.byzantine_fraction, run.seed) == ("fedeat", "sign_flip", 0.3, 0)
    assert len(run.rounds) == 3
    assert len(run.partition) == 10


def test_a_finished_comparison_needs_no_note(comparison: Path) -> None:
    records = read_directory(comparison)
    assert records.notes == ()
    assert len(records.runs) == 8
    assert len(records.rows) == 36


def test_half_a_last_line_is_left_out_and_noted(run_directory: Path) -> None:
    file = run_directory / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    run = read_run(run_directory)
    assert len(run.rounds) == 3
    assert run.notes == ("metrics.jsonl: 1 unreadable line (a kill can leave half a line) left out",)


def test_a_cut_multibyte_character_is_survived(run_directory: Path) -> None:
    file = run_directory / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + '{"kind": "é'.encode()[:-1])
    assert len(read_run(run_directory).rounds) == 3


def test_an_unfinished_run_says_how_far_it_is(run_directory: Path) -> None:
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    cut = next(index for index, line in enumerate(lines) if '"round": 1' in line)
    (run_directory / "metrics.jsonl").write_text("\n".join(lines[:cut]) + "\n")
    (run_directory / "evaluation.json").unlink()
    notes = read_run(run_directory).notes
    assert "in progress or stopped: 1 of 3 rounds are recorded" in notes
    assert "no evaluation.json: not evaluated yet" in notes


def test_a_round_written_twice_counts_once(run_directory: Path) -> None:
    file = run_directory / "metrics.jsonl"
    file.write_text(file.read_text() * 2)
    assert len(read_run(run_directory).rounds) == 3


FILES = ("config.toml", "environment.json", "partition.json", "metrics.jsonl", "timings.jsonl", "evaluation.json")
BROKEN = (b"", b"\xff\xfe{", b"[", b"[1, null]", b'{"rows": 3, "clients": [], "a": NaN}', b"{}" * 9)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_never_an_error(run_directory: Path, name: str, content: bytes) -> None:
    (run_directory / name).write_bytes(content)
    read_directory(run_directory)


def test_deep_nesting_is_left_out(run_directory: Path) -> None:
    (run_directory / "evaluation.json").write_text("[" * 200_000)
    assert "evaluation.json is broken or half written and was left out" in read_run(run_directory).notes


def test_metrics_alone_are_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (records,) = read_directory(tmp_path).runs
    assert "metrics.jsonl holds no record yet" in records.notes


def test_an_evaluation_alone_takes_the_directory_as_its_method(tmp_path: Path) -> None:
    directory = tmp_path / "mistral"
    directory.mkdir()
    (directory / "evaluation.json").write_text(json.dumps({"rows": [{"task": "sst2", "accuracy": 0.5}]}))
    (run,) = read_directory(directory).runs
    assert [row.method for row in run.rows] == ["mistral"]
    assert run.notes == ("an evaluation alone: there are no records of training",)


def test_a_comparison_in_progress_shows_the_finished_runs(tmp_path: Path, new_run: NewRun) -> None:
    new_run(tmp_path / "runs" / "a", "fedavg", "none")
    new_run(tmp_path / "runs" / "b", "gm", "none")
    (tmp_path / "runs" / "b" / "evaluation.json").unlink()
    records = read_directory(tmp_path)
    assert {row.method for row in records.rows} == {"fedavg"}
    assert "the tables hold the runs that are evaluated so far" in records.notes
    assert "b: no evaluation.json: not evaluated yet" in records.notes


def test_runs_of_a_grid_that_grew_are_in_its_tables(tmp_path: Path, new_run: NewRun) -> None:
    for seed in (0, 1):
        new_run(tmp_path / "runs" / f"gm-seed{seed}", "gm", "none", seed)
    stored = json.loads((tmp_path / "runs" / "gm-seed0" / "evaluation.json").read_text())["rows"]
    (tmp_path / "results.json").write_text(json.dumps([{**row, "run": "runs/gm-seed0"} for row in stored]))
    records = read_directory(tmp_path)
    assert sorted({row.seed for row in records.rows}) == [0, 1]
    assert len(records.rows) == 2 * len(stored)
    assert "results.json does not have gm-seed1; the tables do" in records.notes


def test_the_base_model_of_a_comparison_is_no_run(comparison: Path, tmp_path: Path, new_run: NewRun) -> None:
    new_run(tmp_path / "runs" / "gm", "gm", "none")
    rows = [row for row in json.loads((comparison / "results.json").read_text()) if row["method"] == "base"]
    (tmp_path / "runs" / "base").mkdir()
    (tmp_path / "runs" / "base" / "evaluation.json").write_text(json.dumps({"rows": rows}))
    records = read_directory(tmp_path)
    assert [run.name for run in records.runs] == ["gm"]
    assert {row.method for row in records.rows} == {"base", "gm"}


def test_two_base_models_are_not_one(tmp_path: Path, new_run: NewRun, new_row: Callable[..., dict[str, Any]]) -> None:
    def directory(name: str, accuracy: float) -> Records:
        new_run(tmp_path / name / "runs" / f"gm-{name}", "gm", "none")
        (tmp_path / name / "runs" / "base").mkdir()
        rows = [new_row("base", "none", "sst2", 0, accuracy=accuracy, run=name)]
        (tmp_path / name / "runs" / "base" / "evaluation.json").write_text(json.dumps({"rows": rows}))
        return read_records(tmp_path / name)

    first = directory("a", 0.6)
    same, other = merge([first, directory("b", 0.6)]), merge([first, directory("c", 0.9)])
    assert [row.accuracy for row in same.rows if row.method == "base"] == [0.6]
    second = replace(first, rows=tuple(replace(row, task="qqp") for row in first.rows))
    both = merge([first, second])
    assert [row.task for row in both.rows if row.method == "base"] == ["sst2", "qqp"]
    assert not [row for row in other.rows if row.method == "base"]
    assert "the directories have different base models; the tables have none of them" in other.notes


def test_any_other_directory_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RecordError, match=r"neither a comparison nor a run.*got notes\.txt\. Give the directory"):
        read_directory(tmp_path)


def test_an_empty_directory_is_named_empty(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="got an empty directory"):
        read_directory(tmp_path)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no directory at"):
        read_directory(tmp_path / "absent")


def test_equal_runs_keep_apart_by_their_names(tmp_path: Path, new_run: NewRun) -> None:
    for name in ("small", "large"):
        new_run(tmp_path / name, "fedeat", "none")
    records = merge([read_directory(tmp_path / name) for name in ("small", "large")])
    assert {row.method for row in records.rows} == {"fedeat (small)", "fedeat (large)"}
    assert [run.method for run in records.runs] == ["fedeat (small)", "fedeat (large)"]


def test_runs_that_differ_keep_their_methods(tmp_path: Path, new_run: NewRun) -> None:
    new_run(tmp_path / "a", "fedeat", "none", 0)
    new_run(tmp_path / "b", "fedeat", "none", 1)
    records = merge([read_directory(tmp_path / name) for name in ("a", "b")])
    assert {row.method for row in records.rows} == {"fedeat"}
