"""Comparisons that can say "no difference": calibrated on models that do not differ, and able to find one that does."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedeat.evaluation.differences import Difference, compare_methods, corrected, holm
from fedeat.evaluation.outcomes import Outcomes
from fedeat.evaluation.statistics import mcnemar

# Pairs of each distinct original, about as AdvGLUE has them: 62 originals, 131 pairs.
SIZES = [1] * 34 + [2] * 14 + [3] * 6 + [4] * 3 + [6] * 2 + [8] * 2 + [9]
PAIRS = [(group, number) for group, size in enumerate(SIZES) for number in range(size)]


def model(rate: float, *, seed: int, together: float = 0.5) -> Outcomes:
    """A model right on 85 % of originals; its pairs are broken at a rate, some of them as their whole original is."""
    draw = random.Random(seed)
    whole = [draw.random() < rate for _ in SIZES]
    right = [draw.random() < 0.85 for _ in SIZES]
    broken = [whole[g] if draw.random() < together else draw.random() < rate for g, _ in PAIRS]
    counted = tuple(int(right[group]) for group, _ in PAIRS)
    return Outcomes(
        tuple(PAIRS),
        tuple(group for group, _ in PAIRS),
        counted,
        tuple(int(fell and c) for fell, c in zip(broken, counted, strict=True)),
    )


def planted(outcome: Outcomes, points: int, *, seed: int) -> Outcomes:
    """The same model with so many points fewer of its counted pairs broken."""
    draw = random.Random(seed)
    broken = [index for index, hit in enumerate(outcome.hits) if hit]
    saved = set(draw.sample(broken, round(points / 100 * sum(outcome.counted))))
    hits = tuple(int(hit and index not in saved) for index, hit in enumerate(outcome.hits))
    return Outcomes(outcome.texts, outcome.groups, outcome.counted, hits)


def compared(runs: Mapping[str, Mapping[int, Outcomes]], *, seed: int = 0) -> list[Difference]:
    return corrected(compare_methods(runs, task="sst2", measure="asr", seed=seed, resamples=1000))


def test_identical_models_never_differ() -> None:
    one = model(0.4, seed=1)
    for seed in range(100):
        (found,) = compared({"a": {0: one}, "b": {0: one}}, seed=seed)
        assert (found.value, found.low, found.high, found.adjusted, found.better) == (0, 0, 0, 1, None)


def test_models_alike_but_for_chance_are_said_to_differ_in_at_most_5_of_100_seeds() -> None:
    shown = [
        bool(compared({"a": {0: model(0.4, seed=2 * s)}, "b": {0: model(0.4, seed=2 * s + 1)}}, seed=s)[0].better)
        for s in range(100)
    ]
    assert sum(shown) <= 5


def test_four_methods_alike_over_three_seeds_show_a_difference_in_at_most_5_of_100_tables() -> None:
    shown = 0
    for table in range(100):
        runs = {
            name: {s: model(0.4, seed=1000 * table + 10 * index + s) for s in range(3)}
            for index, name in enumerate("abcd")
        }
        found = corrected(compare_methods(runs, task="sst2", measure="asr", seed=table, resamples=400))
        assert len(found) == 6
        shown += any(item.better for item in found)
    assert shown <= 5


def test_methods_whose_trainings_scatter_alike_differ_in_at_most_5_of_100_tables() -> None:
    # Each run has a rate of its own, ten points around .4: with three seeds one method is luckier in all of them one
    # time in four, which no resampling of three seeds would call chance.
    shown = 0
    for table in range(100):
        draw = random.Random(table)
        runs = {
            name: {s: model(draw.gauss(0.4, 0.1), seed=1000 * table + 10 * index + s) for s in range(3)}
            for index, name in enumerate("ab")
        }
        (found,) = corrected(compare_methods(runs, task="sst2", measure="asr", seed=table, resamples=1000))
        shown += found.better is not None
    assert shown <= 5


def test_15_points_planted_are_found_whatever_the_bootstrap_draws() -> None:
    worse = model(0.45, seed=5)
    for seed in range(20):
        (found,) = compared({"plain": {0: worse}, "robust": {0: planted(worse, 15, seed=seed)}}, seed=seed)
        assert found.better == "robust"
        assert found.value == pytest.approx(0.15, abs=0.01)
        assert 0 < found.low < found.value < found.high
        assert found.detectable < 0.15


def test_15_points_planted_are_found_over_five_seeds_that_scatter() -> None:
    worse = {s: model(0.45 + 0.02 * (s - 2), seed=s) for s in range(5)}
    better = {s: planted(run, 13 + s, seed=s) for s, run in worse.items()}
    for seed in range(20):
        (found,) = compared({"plain": worse, "robust": better}, seed=seed)
        assert found.better == "robust"
        assert found.run_error > 0
        assert found.detectable < 0.15


def test_a_difference_in_one_of_many_comparisons_survives_the_correction() -> None:
    runs = {name: {0: model(0.45, seed=9)} for name in "abcdef"}
    runs["best"] = {0: planted(runs["a"][0], 30, seed=0)}
    found = compared(runs)
    assert len(found) == 21
    assert {item.better for item in found if "best" in (item.first, item.second)} == {"best"}
    assert not any(item.better for item in found if "best" not in (item.first, item.second))


def test_one_pair_an_original_and_one_seed_is_mcnemars_test() -> None:
    texts = tuple(range(40))
    first = Outcomes(texts, texts, (1,) * 40, tuple(int(i < 15) for i in range(40)))
    second = Outcomes(texts, texts, (1,) * 30 + (0,) * 10, tuple(int(i < 4 or i == 20) for i in range(40)))
    (found,) = compare_methods({"a": {0: first}, "b": {0: second}}, task="t", measure="asr")
    assert (found.first_votes, found.second_votes) == (11, 1)
    assert found.mcnemar == mcnemar(11, 1)
    assert found.value == pytest.approx(15 / 40 - 5 / 30)


def test_seeds_are_paired_and_those_of_one_method_alone_left_out() -> None:
    runs = {"a": {0: model(0.3, seed=0), 1: model(0.3, seed=1)}, "b": {1: model(0.3, seed=1), 2: model(0.9, seed=2)}}
    (found,) = compared(runs)
    assert (found.seeds, found.value) == (1, 0.0)
    assert compared({"a": {0: model(0.3, seed=0)}, "b": {1: model(0.3, seed=0)}}) == []


def test_seeds_that_disagree_widen_the_interval() -> None:
    base = model(0.5, seed=3)
    same = {s: planted(base, 15, seed=0) for s in range(4)}
    torn = {s: planted(base, 30 * (s % 2), seed=0) for s in range(4)}
    (firm,) = compared({"a": dict.fromkeys(range(4), base), "b": same})
    (loose,) = compared({"a": dict.fromkeys(range(4), base), "b": torn})
    assert firm.value == pytest.approx(loose.value, abs=0.01)
    assert loose.high - loose.low > 1.3 * (firm.high - firm.low)


def test_no_text_right_on_its_original_is_no_comparison() -> None:
    texts = tuple(range(5))
    lost = Outcomes(texts, texts, (0,) * 5, (0,) * 5)
    assert compared({"a": {0: lost}, "b": {0: Outcomes(texts, texts, (1,) * 5, (0,) * 5)}}) == []
    assert corrected([]) == []


def test_tests_that_point_opposite_ways_show_nothing() -> None:
    # The first method loses ten pairs of each of 16 originals, the second the one pair of each of 46 others.
    texts = [(group, pair) for group in range(62) for pair in range(10 if group < 16 else 1)]
    groups, counted = tuple(group for group, _ in texts), (1,) * len(texts)
    many = Outcomes(tuple(texts), groups, counted, tuple(int(group < 16) for group in groups))
    others = Outcomes(tuple(texts), groups, counted, tuple(int(group >= 16) for group in groups))
    (found,) = compared({"a": {0: many}, "b": {0: others}})
    assert found.value > 0.5
    assert (found.first_votes, found.second_votes) == (16, 46)
    assert max(found.mcnemar, found.bootstrap) < 0.01
    assert (found.p_value, found.better) == (1.0, None)


def test_few_texts_cannot_show_a_small_difference_and_say_so() -> None:
    texts = tuple(range(12))
    one = Outcomes(texts, texts, (1,) * 12, (1, *(0,) * 11))
    (found,) = compared({"a": {0: one}, "b": {0: one}})
    # Six votes of twelve are the fewest with p <= .05: what four of five draws of originals have.
    assert stats.binom.sf(5, 12, found.detectable) == pytest.approx(0.8)
    short = Outcomes(texts[:4], texts[:4], (1,) * 4, (1, 0, 0, 0))
    assert compared({"a": {0: short}, "b": {0: short}})[0].detectable == 1.0


def test_what_could_have_been_shown_is_never_less_than_what_was_not() -> None:
    # Three seeds leave Student's t two degrees of freedom: its tail decides at the level of a table's first step.
    draw = random.Random(1)
    for spread in (0.0, 0.001, 0.03, 0.1):
        worse = {s: model(0.6 + draw.gauss(0, spread), seed=s) for s in range(3)}
        better = {s: model(0.3 + draw.gauss(0, spread), seed=s) for s in range(3)}
        (found,) = compare_methods({"a": worse, "b": better}, task="t", measure="asr", resamples=20_000)
        assert found.run_error > 0
        tested = corrected([found, *[replace(found, bootstrap=1.0, value=0.0)] * 47])[0]
        assert tested.significant == (tested.adjusted <= 0.05)
        assert tested.significant or abs(tested.value) < tested.detectable


@pytest.mark.parametrize(
    ("text", "run", "comparisons", "expected"),
    [
        (0.02, 0.0, 1, 0.02 * (1.960 + 0.842)),  # normal quantiles
        (0.0, 0.02, 1, 0.02 * (4.303 + 1.061)),  # Student's, two degrees of freedom
        (0.0, 0.02, 48, 0.02 * (30.96 + 1.061)),
        (0.02, 0.0, 48, 0.02 * (3.279 + 0.842)),
        (0.02, 1e-17, 48, 0.02 * (3.279 + 0.842)),
    ],
)
def test_what_could_have_been_shown_is_a_tail_and_a_power(
    text: float, run: float, comparisons: int, expected: float
) -> None:
    one = Difference("t", "asr", "a", "b", 0.0, 0.0, 0.0, 0, 0, 1.0, 1.0, 1.0, text, run, 1.0, 3, 1000)
    assert corrected([one] * comparisons)[0].detectable == pytest.approx(expected, rel=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_between_the_raw_value_and_bonferronis(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p) + 1e-12
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
