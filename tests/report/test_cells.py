"""Cells over seeds, and what may be printed bold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scipy import stats

from fedeat.evaluation.statistics import Interval
from fedeat.report.cells import (
    Cell,
    Condition,
    Estimate,
    best_methods,
    conditions,
    estimate,
    group,
    method_order,
    read_rows,
    without_common_partition,
)

NewRow = Callable[..., dict[str, Any]]


def cell(accuracy: float, asr: float, *, reach: float = 0.03, flags: tuple[str, ...] = ()) -> Cell:
    def around(value: float) -> Estimate:
        return Estimate(value, value - reach, value + reach, None, 1)

    return Cell(around(accuracy), around(asr), 100, 100, 80, 40, flags)


def test_one_seed_keeps_its_own_interval() -> None:
    assert estimate([(0.8, 0.7, 0.9)]) == Estimate(0.8, 0.7, 0.9, None, 1)


def test_several_seeds_widen_to_the_t_interval() -> None:
    values = [0.70, 0.80, 0.75]
    found = estimate([(value, value - 0.01, value + 0.01) for value in values])
    low, high = stats.t.interval(0.95, 2, loc=0.75, scale=stats.sem(values))
    assert found.mean == pytest.approx(0.75)
    assert found.deviation == pytest.approx(0.05)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_equal_seeds_keep_the_interval_of_their_texts() -> None:
    found = estimate([(0.5, 0.4, 0.6)] * 4)
    assert (found.low, found.high) == (pytest.approx(0.4), pytest.approx(0.6))


def test_an_interval_over_seeds_that_is_known_stands_in_place_of_theirs() -> None:
    found = estimate([(0.4, 0.3, 0.5), (0.6, 0.5, 0.7)], Interval(0.35, 0.66))
    assert (found.mean, found.low, found.high, found.seeds) == (0.5, 0.35, 0.66, 2)
    assert estimate([(0.4, 0.3, 0.5)], Interval(0.35, 0.66)).low == 0.3


def test_flags_of_several_seeds_are_counted(new_row: NewRow) -> None:
    flags = (["constant prediction: 97 % yes"], ["constant prediction: 99 % no", "few originals right: 3"], [])
    rows = [new_row("gm", "none", "sst2", seed, flags=given) for seed, given in enumerate(flags)]
    (found,) = group(read_rows(rows)[0], Condition("none", 0.0)).values()
    assert found.flags == ("constant prediction in 2 of 3 seeds", "few originals right in 1 of 3 seeds")


def test_undefined_seeds_are_left_out_and_counted() -> None:
    assert estimate([(None, None, None)]) == Estimate()
    assert estimate([(None, None, None), (0.5, 0.4, 0.6)]).seeds == 1


def test_intervals_stay_within_zero_and_one() -> None:
    found = estimate([(0.0, 0.0, 0.1), (0.2, 0.1, 0.3)])
    assert found.low == 0.0
    assert found.high is not None
    assert found.high <= 1.0


def test_nothing_is_bold_where_no_difference_is_shown() -> None:
    cells = {"fedavg": cell(0.80, 0.90), "fedeat": cell(0.83, 0.10)}
    assert best_methods(cells, accuracy=[], asr=[]) == (frozenset(), frozenset())


def test_what_is_shown_to_be_better_than_one_and_worse_than_none_is_bold() -> None:
    cells = {name: cell(0.8, 0.5) for name in ("fedavg", "eat", "gm", "fedeat")}
    shown = [("fedeat", "fedavg"), ("gm", "fedavg"), ("eat", "gm")]
    assert best_methods(cells, accuracy=[], asr=shown) == (frozenset(), {"fedeat", "eat"})


def test_a_flagged_method_is_never_bold_and_beats_no_one() -> None:
    cells = {"fedavg": cell(0.80, 0.50), "eat": cell(0.80, 0.0, flags=("constant prediction: 98 % yes",))}
    shown = [("eat", "fedavg")]
    assert best_methods(cells, accuracy=shown, asr=shown) == (frozenset(), frozenset())


def test_a_flagged_method_is_beaten_in_accuracy() -> None:
    cells = {"fedavg": cell(0.50, 0.0, flags=("constant prediction: 98 % yes",)), "gm": cell(0.80, 0.50)}
    assert best_methods(cells, accuracy=[("gm", "fedavg")], asr=[]) == ({"gm"}, frozenset())


def test_a_low_asr_bought_with_accuracy_is_not_bold() -> None:
    cells = {"fedavg": cell(0.50, 0.10), "gm": cell(0.80, 0.50), "fedeat": cell(0.81, 0.30)}
    accuracy = [("gm", "fedavg"), ("fedeat", "fedavg")]
    asr = [("fedavg", "gm"), ("fedavg", "fedeat"), ("fedeat", "gm")]
    assert best_methods(cells, accuracy=accuracy, asr=asr) == ({"gm", "fedeat"}, {"fedeat"})


def test_the_base_model_does_not_compete() -> None:
    cells = {"base": cell(0.5, 0.1), "fedavg": cell(0.8, 0.5)}
    assert best_methods(cells, accuracy=[], asr=[("base", "fedavg")]) == (frozenset(), frozenset())


def test_base_comes_first_then_the_papers_order() -> None:
    given = ["krum", "fedeat", "gm-nnm", "base", "gm", "fedavg", "krum"]
    assert method_order(given) == ["base", "fedavg", "gm", "fedeat", "gm-nnm", "krum"]
    assert method_order(reversed(given)) == method_order(given)  # as the rows of another table may have them


def test_the_base_model_stands_in_every_condition(new_row: NewRow) -> None:
    rows, _ = read_rows([new_row("fedavg", "sign_flip", "sst2", 0), new_row("base", "none", "sst2", 0)])
    (condition,) = conditions(rows)
    assert condition.title == "Sign flip, 30 % malicious clients"
    assert set(group(rows, condition)) == {("fedavg", "sst2"), ("base", "sst2")}


def test_several_partitions_are_conditions_of_their_own_and_one_is_not_named(new_row: NewRow) -> None:
    records = [new_row("gm", "none", "sst2", 0, partition=name) for name in ("even", "one task a client")]
    rows = without_common_partition(read_rows([*records, new_row("base", "none", "sst2", 0)])[0])
    assert [item.title for item in conditions(rows)] == [
        "No malicious clients; even",
        "No malicious clients; one task a client",
    ]
    (condition,) = conditions(without_common_partition(rows[:1]))
    assert condition.title == "No malicious clients"


@pytest.mark.parametrize(
    ("attack", "title"), [("ipm", "IPM, 30 %"), ("min_max", "Min max, 30 %"), ("nan", "NaN, 30 %")]
)
def test_attacks_are_named_as_the_literature_does(attack: str, title: str) -> None:
    assert Condition.of(attack, 0.3).title == f"{title} malicious clients"


def test_seeds_share_a_cell_and_sum_their_counts(new_row: NewRow) -> None:
    records = [new_row("gm", "none", "sst2", seed) for seed in (0, 1, 2)]
    rows, _ = read_rows(records)
    found = group(rows, rows[0].condition)["gm", "sst2"]
    assert found.accuracy.seeds == 3
    assert found.broken == sum(record["broken"] for record in records)


def test_rows_of_no_use_are_left_out_with_a_note() -> None:
    rows, notes = read_rows([{"task": "sst2"}, 3, None])
    assert rows == []
    assert notes == ["3 result rows without method or task left out"]


def test_values_of_the_wrong_kind_become_unknown(new_row: NewRow) -> None:
    wrong = {"asr": float("nan"), "pairs": "many", "flags": "x", "histogram": [1], "accuracy": True}
    ((row,), _) = read_rows([new_row("gm", "none", "sst2", 0) | wrong])
    assert (row.accuracy, row.pairs, row.flags, row.histogram) == (None, 0, (), ())
