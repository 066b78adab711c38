"""What a comparison shows and what it does not is said from its tests, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedeat.evaluation.differences import Difference
from fedeat.report.cells import Condition, conditions, read_rows
from fedeat.report.claims import losses, method_note, shows, shows_not
from fedeat.report.differences import Comparisons, compare_runs
from fedeat.report.reading import read_directory
from fedeat.report.tables import ResultTable, result_tables

NewRow = Callable[..., dict[str, Any]]

FREE = Condition("none", 0.0)
LOWER = Difference(
    "sst2", "asr", "fedavg", "fedeat", 0.2, 0.1, 0.3, 20, 2, 1e-4, 5e-4, 0.006, 0.05, 0.01, 0.13, seeds=3, originals=62
)
SAME = replace(LOWER, task="qqp", value=0.05, low=-0.02, high=0.12, adjusted=0.4, detectable=0.21)


def table(rows: list[dict[str, Any]], *differences: Difference) -> list[ResultTable]:
    return result_tables(read_rows(rows)[0], {FREE: Comparisons(differences)})


def rows_of(new_row: NewRow, **changes: Any) -> list[dict[str, Any]]:
    return [
        new_row(method, "none", task, 0, accuracy=0.8) | changes
        for method in ("fedavg", "fedeat")
        for task in ("sst2", "qqp")
    ]


def test_a_shown_difference_names_who_where_and_how_much(new_row: NewRow) -> None:
    (sentence,) = shows(table(rows_of(new_row), LOWER, SAME))
    assert sentence == "FedEAT has lower attack success rate than FedAvg: sst2 by 20.0 [10.0, 30.0]."


def test_a_lower_rate_at_lost_accuracy_is_no_gain(new_row: NewRow) -> None:
    lost = replace(LOWER, measure="accuracy", value=0.1, low=0.05, high=0.15)
    tables = table(rows_of(new_row), LOWER, lost)
    assert [sentence.split(" than ")[0] for sentence in shows(tables)] == ["FedAvg has higher accuracy"]
    assert "1 lower attack success rate is not counted" in " ".join(shows_not(tables, read_rows(rows_of(new_row))[0]))


def test_where_none_is_shown_nothing_is_claimed_and_the_power_is_said(new_row: NewRow) -> None:
    tables = table(rows_of(new_row), SAME)
    assert shows(tables) == []
    text = " ".join(shows_not(tables, read_rows(rows_of(new_row))[0]))
    assert "In attack success rate, 1 of 1 comparison of two methods shows no difference" in text
    assert "could have shown differences of 21.0 points or more" in text


def test_comparisons_too_small_to_show_anything_are_counted_and_not_averaged_in(new_row: NewRow) -> None:
    rows, blind = rows_of(new_row), replace(SAME, task="qqp", detectable=1.0)
    text = " ".join(shows_not(table(rows, SAME, blind), read_rows(rows)[0]))
    assert "differences of 21.0 points or more (80 % power); 1 of the comparisons, of few texts or seeds," in text
    assert "could have shown no difference, however large" in " ".join(
        shows_not(table(rows, blind), read_rows(rows)[0])
    )


def test_bold_follows_the_tests_and_not_the_look_of_the_intervals(new_row: NewRow) -> None:
    apart = [
        new_row("fedavg", "none", "sst2", 0, accuracy=0.8, asr=0.9),
        new_row("fedeat", "none", "sst2", 0, accuracy=0.8, asr=0.1),
    ]
    assert table(apart)[0].bold_asr == frozenset()
    assert table(apart, replace(LOWER, adjusted=0.06))[0].bold_asr == frozenset()
    assert table(apart, LOWER)[0].bold_asr == {("fedeat", "sst2")}


def test_flags_seeds_and_missing_tests_are_said(new_row: NewRow) -> None:
    flagged = rows_of(new_row, flags=["constant prediction: 98 % yes"])
    text = " ".join(shows_not(table(flagged), read_rows(flagged)[0]))
    assert "4 cells are flagged (2 of FedAvg and 2 of FedEAT)" in text
    assert "a model that always answers the same is not robust." in text
    assert "guessing" not in text
    assert "No two methods could be compared" in text
    assert "seed" not in text
    assert method_note(table(flagged)) == ""
    several = [*rows_of(new_row), *rows_of(new_row, seed=1)]

    def said(*seeds: int) -> str:
        tested = [replace(LOWER, seeds=count) for count in seeds]
        return " ".join(shows_not(table(several, *tested), read_rows(several)[0]))

    assert "One seed was run: the differences are between these trained models" in said(1, 1)
    assert "2 seeds were run; a difference" in said(2)
    assert "these trained models" not in said(2)
    assert "Two methods share 1 to 2 seeds; " in said(1, 2)
    assert "Where it is one seed, the differences are between these trained models" in said(1, 2)
    note = method_note(table(several, LOWER, SAME))
    assert "the larger p-value counts, 1 where the two point opposite ways, corrected by Holm over the table" in note
    assert "2 comparisons at most" in note


def test_over_many_tables_a_sentence_speaks_of_all_of_them(new_row: NewRow) -> None:
    rows = [
        new_row(m, a, "sst2", 0, accuracy=0.8) for m in ("fedavg", "fedeat") for a in ("none", "ipm", "alie", "nan")
    ]
    known = read_rows(rows)[0]
    tested = {condition: Comparisons((LOWER,)) for condition in conditions(known) if condition.attack != "nan"}
    (sentence,) = shows(result_tables(known, tested))
    assert sentence.startswith("FedEAT has lower attack success rate than FedAvg in 3 of 4 tables: without malicious ")
    assert "; with 30 % malicious clients (IPM) on sst2 by 20.0 points; with 30 % malicious clients (ALIE) " in sentence


def test_losses_say_where_they_are_shown_and_where_not() -> None:
    flip, ipm = Condition("sign_flip", 0.3), Condition("ipm", 0.3)
    lost = replace(LOWER, measure="accuracy", value=-0.2, low=-0.3, high=-0.1)
    costs = [(flip, "gm", lost), (flip, "gm", replace(lost, task="qqp", value=-0.1)), (ipm, "gm", SAME)]
    costs += [(flip, "fedeat", SAME)]
    assert losses(costs) == [
        "GM loses accuracy with 30 % malicious clients (sign flip) on every task by 10.0 to 20.0 points, and is not "
        "shown to lose accuracy with 30 % malicious clients (IPM).",
        "FedEAT is not shown to lose accuracy with 30 % malicious clients (sign flip).",
    ]
    both = [*costs[3:], (flip, "fedavg", SAME)]
    assert losses(both) == [
        "FedAvg and FedEAT are not shown to lose accuracy with 30 % malicious clients (sign flip).",
    ]
    many = [(Condition("ipm", share / 10), "gm", SAME) for share in (1, 2, 3)]
    assert losses(many) == ["GM is not shown to lose accuracy under any of the 3 conditions."]
    assert losses([*costs[:2], *many])[0].endswith(
        "by 10.0 to 20.0 points, and is not shown to lose accuracy under any of the other 3 conditions."
    )


def test_records_are_tested_on_their_predictions(comparison: Path) -> None:
    records = read_directory(comparison)
    tested = compare_runs(records.rows, records.runs)
    attacked = tested[Condition("sign_flip", 0.3)]
    # Four methods, four tasks: six comparisons a column, but none of ASR with EAT's flagged cell.
    assert len(tested[FREE].differences) == 4 * 2 * 6
    assert len(attacked.differences) == 4 * 2 * 6 - 3
    assert {"gm", "fedeat"} == {better for better, _ in attacked.shown("sst2", "accuracy")}
    assert not [item for item in tested[FREE].differences if item.measure == "accuracy" and item.significant]
    assert compare_runs(records.rows, records.runs) == tested


def test_predictions_that_are_missing_or_broken_leave_the_rows_untested(comparison: Path) -> None:
    records = read_directory(comparison)
    broken = [replace(run, predictions={"sst2": {"pairs": 3}, "qqp": {}}) for run in records.runs]
    assert all(not found.differences for found in compare_runs(records.rows, broken).values())
