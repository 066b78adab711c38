from __future__ import annotations

import json
from typing import Any

import pytest

from fedeat.evaluation.robustness import JudgedPair, TaskPredictions, asr, average, is_win, rank, task_row


def pair(label: int, original: int | None, modified: int | None, group: str = "a", index: int = 0) -> JudgedPair:
    return {"index": index, "group": group, "label": label, "original": original, "modified": modified, "method": "m"}


def predictions(
    pairs: list[JudgedPair], labels: list[int] | None = None, answers: list[int | None] | None = None
) -> TaskPredictions:
    return {"benign": {"labels": labels or [], "predictions": answers or []}, "pairs": pairs}


def varied(broken: int, whole: int, wrong: int = 0) -> list[JudgedPair]:
    """Pairs of alternating labels, each of an original of its own."""
    kinds = [(True, False)] * broken + [(True, True)] * whole + [(False, True)] * wrong
    pairs = []
    for index, (right, kept) in enumerate(kinds):
        label = index % 2
        pairs.append(pair(label, label if right else 1 - label, label if kept else 1 - label, f"g{index}", index))
    return pairs


def test_asr_is_the_broken_among_those_right_on_the_original() -> None:
    pairs = [pair(1, 1, 0), pair(1, 1, 1), pair(0, 0, 0), pair(0, 1, 1), pair(1, 0, 1)]
    success = asr(pairs)
    assert (success.broken, success.benign_correct, success.rate) == (1, 3, 1 / 3)


def test_pair_wrong_on_its_original_is_never_broken() -> None:
    assert asr([pair(1, 0, 0), pair(1, None, 0), pair(0, 1, None)]).rate is None


def test_unparsable_answer_to_a_modified_text_is_wrong() -> None:
    assert asr([pair(1, 1, None)]).rate == 1.0


def test_row_counts_pairs_originals_and_answers() -> None:
    pairs = [pair(1, 1, 0, "a"), pair(1, 1, 1, "a"), pair(0, 0, 0, "b"), pair(0, 1, None, "c")]
    row = task_row("sst2", predictions(pairs, [0, 1, 1, 0], [0, 1, 0, None]), seed=0)
    assert (row["pairs"], row["originals"], row["benign_correct"], row["broken"]) == (4, 3, 3, 1)
    assert (row["accuracy"], row["benign"]) == (0.5, 4)
    assert (row["accuracy_original"], row["accuracy_modified"]) == (0.75, 0.5)
    assert row["histogram"] == {"negative": 5, "positive": 5, "unparsable": 2}
    assert row["unparsable"] == 2 / 12
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert row["asr_low"] <= row["asr"] <= row["asr_high"]


def test_row_is_json_and_the_same_for_the_same_predictions_and_seed() -> None:
    found = predictions(varied(12, 30, 5))
    row = task_row("sst2", found, seed=4)
    assert json.loads(json.dumps(row, allow_nan=False)) == row == task_row("sst2", found, seed=4)
    assert row["flags"] == []


def test_accuracy_without_benign_texts_is_over_the_distinct_originals() -> None:
    pairs = [pair(1, 1, 0, "a"), pair(1, 1, 1, "a"), pair(1, 1, 1, "a"), pair(0, 1, 0, "b")]
    row = task_row("sst2", predictions(pairs), seed=0)
    assert (row["accuracy"], row["benign"]) == (0.5, 2)


def test_row_without_pairs_has_accuracy_alone() -> None:
    labels = [0, 1] * 20
    row = task_row("sst2", predictions([], labels, [*labels[:38], 1, 0]), seed=0)
    assert (row["accuracy"], row["asr"], row["asr_low"], row["accuracy_original"]) == (0.95, None, None, None)
    assert row["flags"] == []


def test_constant_predictor_has_asr_zero_is_flagged_and_never_wins() -> None:
    labels = [index % 2 for index in range(120)]
    constant = task_row("sst2", predictions([pair(y, 1, 1, f"g{i}", i) for i, y in enumerate(labels)]), seed=0)
    honest = task_row("sst2", predictions(varied(30, 70, 20)), seed=0)
    assert constant["asr"] == 0.0
    assert constant["flags"][0] == "constant prediction: 100 % positive"
    assert not is_win(constant, honest)
    assert not is_win(honest, constant)
    assert rank([constant, honest]) == [honest]


def test_nearly_constant_predictor_is_flagged_above_95_percent_alone() -> None:
    def flags(others: int) -> list[str]:
        labels = [index % 2 for index in range(100)]
        answers: list[int | None] = [0 if index < others else 1 for index in range(100)]
        found = task_row("sst2", predictions([], labels, answers), seed=0)["flags"]
        return [flag for flag in found if flag.startswith("constant")]

    assert flags(4) == ["constant prediction: 96 % positive"]
    assert flags(5) == []


def test_collapse_on_the_pairs_alone_is_flagged_as_such() -> None:
    labels = [index % 2 for index in range(1000)]
    pairs = [pair(i % 2, 0, 0, f"g{i}", i) for i in range(40)]
    row = task_row("sst2", predictions(pairs, labels, list(labels)), seed=0)
    assert row["flags"] == ["constant prediction on the pairs: 100 % negative"]


def test_data_of_one_label_makes_no_constant_predictor() -> None:
    row = task_row("sst2", predictions([pair(1, 1, 1, f"g{i}") for i in range(20)]), seed=0)
    assert row["flags"] == []


def test_many_unparsable_answers_are_flagged() -> None:
    labels = [0, 1] * 20
    answers: list[int | None] = [None] * 9 + list(labels[9:])
    flags = task_row("sst2", predictions([], labels, answers), seed=0)["flags"]
    assert flags == ["unparsable answers: 22 %"]


def test_few_originals_right_are_flagged() -> None:
    flags = task_row("sst2", predictions(varied(3, 6, 2)), seed=0)["flags"]
    assert flags == ["few originals right: 9 of 11 pairs"]


def test_model_no_better_than_the_most_common_label_is_flagged() -> None:
    flags = task_row("mnli", predictions([], [0, 1, 2, 2] * 10, [2, 1, 0, 1] * 10), seed=0)["flags"]
    assert flags == ["no better than guessing: accuracy 25 %, always the most common label 50 %"]


def test_pairs_that_are_the_same_to_the_model_are_flagged_above_5_percent() -> None:
    def row(same: int) -> dict[str, Any]:
        pairs = varied(40, 60)
        marked: list[JudgedPair] = [{**entry, "same": True} for entry in pairs[40 : 40 + same]]
        found = predictions([*pairs[:40], *marked, *pairs[40 + same :]])
        return task_row("sst2", {**found, "cut": 2 * same}, seed=0)

    assert (row(5)["same"], row(5)["cut"], row(5)["flags"]) == (5, 10, [])
    assert row(6)["flags"] == ["identical pairs: 6 of 100 are the same tokens on both sides"]
    assert row(6)["asr"] == 0.4  # they stay in the denominator: what was measured is shown, and flagged
    assert rank([row(6), row(5)]) == [row(5)]
    assert (average([row(5), row(6)])["cut"], average([row(5), row(6)])["same"]) == (22, 11)


def test_older_predictions_do_not_say_what_was_cut() -> None:
    row = task_row("sst2", predictions(varied(12, 30)), seed=0)
    assert (row["cut"], row["same"], row["flags"]) == (None, None, [])
    kept = {name: value for name, value in row.items() if name not in ("cut", "same")}
    assert average([kept])["cut"] is None


def test_lower_asr_wins_between_sound_rows() -> None:
    strong, weak = (task_row("sst2", predictions(varied(n, 100 - n)), seed=0) for n in (10, 40))
    assert is_win(strong, weak)
    assert not is_win(weak, strong)
    assert not is_win(strong, strong)
    assert rank([weak, strong]) == [strong, weak]


def test_average_is_over_tasks_and_keeps_each_tasks_flags() -> None:
    first = {**task_row("sst2", predictions(varied(10, 30)), seed=0), "method": "fedeat"}
    second = {**task_row("qqp", predictions(varied(3, 6)), seed=0), "method": "fedeat"}
    mean = average([first, second])
    assert (mean["task"], mean["method"], mean["pairs"]) == ("average", "fedeat", 49)
    assert mean["asr"] == pytest.approx((10 / 40 + 3 / 9) / 2)
    assert mean["flags"] == ["qqp: few originals right: 9 of 9 pairs"]


def test_average_over_a_task_without_asr_has_none() -> None:
    rows: list[dict[str, Any]] = [task_row("sst2", predictions(p), seed=0) for p in (varied(5, 5), varied(0, 0, 9))]
    assert average(rows)["asr"] is None
    with pytest.raises(ValueError, match="at least one row"):
        average([])
