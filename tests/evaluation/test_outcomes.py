"""Rates over seeds: what the texts and what the runs leave open, and how often the truth is within."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from fedeat import seeding
from fedeat.evaluation.outcomes import Outcomes, outcomes, rate_over_seeds
from fedeat.evaluation.robustness import TaskPredictions
from fedeat.evaluation.statistics import cluster_ratio, wilson


def run(hits: list[int], counted: list[int], size: int = 1) -> Outcomes:
    """A run on texts of which `size` follow each other from one original."""
    return Outcomes(tuple(range(len(hits))), tuple(i // size for i in range(len(hits))), tuple(counted), tuple(hits))


def test_predictions_are_counted_as_a_task_row_counts_them() -> None:
    predictions: TaskPredictions = {
        "benign": {"labels": [0, 1, 1], "predictions": [0, None, 1]},
        "pairs": [
            {"index": 1, "group": "g", "label": 1, "original": 1, "modified": None, "method": "m"},
            {"index": 2, "group": "g", "label": 1, "original": 0, "modified": 1, "method": "m"},
        ],
    }
    assert outcomes(predictions, "asr").hits == (1, 0)
    assert outcomes(predictions, "asr").counted == (1, 0)
    assert outcomes(predictions, "accuracy").hits == (1, 0, 1)
    predictions["benign"] = {"labels": [], "predictions": []}
    assert outcomes(predictions, "accuracy") == Outcomes(("g",), ("g",), (1,), (1,))


def test_one_seed_has_the_cluster_bootstrap_of_its_texts() -> None:
    draw = random.Random(0)
    counted = [int(draw.random() < 0.8) for _ in range(120)]
    hits = [int(bool(c) and draw.random() < 0.4) for c in counted]
    found = rate_over_seeds([run(hits, counted, 3)])
    known = cluster_ratio(hits, counted, [i // 3 for i in range(120)], generator=seeding.generator(0))
    assert found is not None
    assert known is not None
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.015)


def test_runs_that_agree_on_every_text_add_nothing_and_are_no_further_texts() -> None:
    one = run([1, 0, 0, 1, 0, 0, 1, 0, 0, 0] * 6, [1] * 60)
    single, same = rate_over_seeds([one]), rate_over_seeds([one] * 5)
    assert single is not None
    assert same is not None
    assert (same.low, same.high) == pytest.approx((single.low, single.high), abs=0.02)


def test_many_texts_leave_the_t_interval_of_the_seeds() -> None:
    rates = [0.70, 0.80, 0.75]
    runs = [
        run([int(i < rate * 20000) for i in np.random.default_rng(0).permutation(20000)], [1] * 20000) for rate in rates
    ]
    found = rate_over_seeds(runs, resamples=20000)
    low, high = stats.t.interval(0.95, 2, loc=0.75, scale=stats.sem(rates))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, min(high, 1.0)), abs=0.01)


def test_texts_that_are_never_counted_are_no_trials() -> None:
    right = [1] * 3 + [0] * 59
    assert rate_over_seeds([run([0] * 62, right)] * 3) == wilson(0, 3)


def test_texts_of_two_files_are_not_the_same_texts() -> None:
    def answered(labels: list[int]) -> Outcomes:
        return outcomes({"benign": {"labels": labels, "predictions": [*labels]}, "pairs": []}, "accuracy")

    one = answered([0, 1, 1])
    assert one.texts == answered([0, 1, 1]).texts
    assert len(set(one.texts)) == 3
    assert not {*one.texts} & {*answered([0, 1, 0]).texts}
    assert not {*one.texts} & {*answered([0, 1, 1, 1]).texts}


def test_nothing_broken_is_no_certainty_and_nothing_counted_no_rate() -> None:
    none = run([0] * 40, [1] * 40)
    found = rate_over_seeds([none] * 3)
    assert found == wilson(0, 40)
    lost = run([0] * 40, [0] * 40)
    assert rate_over_seeds([lost, none]) == found
    assert rate_over_seeds([lost]) is None


def test_the_true_rate_is_within_nine_times_of_ten_and_more() -> None:
    covered = 0
    for table in range(100):
        draw = random.Random(table)
        hard = [draw.random() < 0.4 for _ in range(60)]
        runs = []
        for _ in range(3):
            rate = draw.gauss(0.4, 0.08)
            fell = [hard[i // 2] if draw.random() < 0.4 else draw.random() < rate for i in range(120)]
            runs.append(run([int(x) for x in fell], [1] * 120, 2))
        found = rate_over_seeds(runs, seed=table, resamples=1000)
        assert found is not None
        covered += found.low <= 0.4 <= found.high
    assert covered >= 92
