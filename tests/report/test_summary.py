"""The paragraph in plain words claims what intervals show and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedeat.report.cells import read_rows
from fedeat.report.summary import summarise

NewRow = Callable[..., dict[str, Any]]


def summary(rows: list[dict[str, Any]]) -> str:
    return " ".join(summarise(read_rows(rows)[0]))


def test_collapsed_and_standing_methods_are_named(rows: list[dict[str, Any]]) -> None:
    text = summary(rows)
    collapsed, standing = text.split("clearly lose accuracy on every task")
    assert "FedAvg (from" in collapsed
    assert "EAT (from" in collapsed
    assert "for GM (from" in standing
    assert "no task shows a loss beyond its interval" in standing


def test_flagged_cells_are_counted_by_method(rows: list[dict[str, Any]]) -> None:
    assert "1 cell is flagged (1 of EAT)" in summary(rows)


def test_overlapping_intervals_make_no_claim(new_row: NewRow) -> None:
    text = summary([new_row(method, "none", "sst2", 0, accuracy=0.8, asr=0.5) for method in ("fedavg", "gm")])
    assert "No difference in attack success rate" in text
    assert "lower" not in text


def test_separate_intervals_make_a_claim_on_that_task_only(new_row: NewRow) -> None:
    rows = [new_row("fedavg", "none", task, 0, accuracy=0.8, asr=0.5) for task in ("sst2", "qqp")]
    rows += [new_row("fedeat", "none", "sst2", 0, accuracy=0.8, asr=0.1), rows[1] | {"method": "fedeat"}]
    text = summary(rows)
    assert "FedEAT is lower than FedAvg on sst2." in text
    assert "In 1 of 2 comparisons" in text


def test_a_constant_predictor_is_no_win(new_row: NewRow) -> None:
    flagged = new_row("fedeat", "none", "sst2", 0, accuracy=0.8, asr=0.0, flags=["constant prediction: 98 % yes"])
    text = summary([new_row("fedavg", "none", "sst2", 0, accuracy=0.8, asr=0.5), flagged])
    assert "lower than" not in text
    assert "1 of FedEAT" in text


def test_a_low_rate_at_lost_accuracy_is_no_win(new_row: NewRow) -> None:
    rows = [new_row("fedavg", "none", "sst2", 0, accuracy=0.8, asr=0.6)]
    rows += [new_row("fedeat", "none", "sst2", 0, accuracy=0.5, asr=0.05)]
    assert "lower than" not in summary(rows)


def test_broken_fedavg_gives_way_to_the_next_reference(new_row: NewRow) -> None:
    rows = [new_row("fedavg", "sign_flip", "sst2", 0, accuracy=0.4, asr=0.6)]
    rows += [new_row("gm", "sign_flip", "sst2", 0, accuracy=0.8, asr=0.6)]
    rows += [new_row("fedeat", "sign_flip", "sst2", 0, accuracy=0.8, asr=0.2)]
    assert "FedEAT is lower than GM on sst2 with 30 % malicious clients (sign flip)" in summary(rows)


def test_a_single_seed_is_said_to_be_one(new_row: NewRow) -> None:
    assert "one seed was run" in summary([new_row("gm", "none", "sst2", 0)])
    assert "2 seeds were run" in summary([new_row("gm", "none", "sst2", seed) for seed in (0, 1)])


def test_no_rows_say_so() -> None:
    assert summary([]) == "Nothing has been evaluated yet."


def test_the_base_model_alone_gets_a_sentence(new_row: NewRow) -> None:
    assert "The base model alone answers" in summary([new_row("base", "none", "sst2", 0)])
