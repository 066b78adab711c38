from __future__ import annotations

from itertools import product
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedeat.evaluation.statistics import Interval, cluster_ratio, mcnemar, wilson


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_wilson_solves_the_score_equation() -> None:
    interval = wilson(7, 20)
    z = NormalDist().inv_cdf(0.975)
    for bound in (interval.low, interval.high):
        assert abs(7 / 20 - bound) == pytest.approx(z * (bound * (1 - bound) / 20) ** 0.5)


@given(st.integers(0, 50), st.integers(0, 50))
def test_wilson_holds_the_share_and_stays_in_bounds(successes: int, failures: int) -> None:
    trials = successes + failures
    interval = wilson(successes, trials)
    assert 0 <= interval.low <= (successes / trials if trials else 0.5) <= interval.high <= 1
    mirrored = wilson(failures, trials)
    assert mirrored.low == pytest.approx(1 - interval.high, abs=1e-12)


def test_wilson_knows_nothing_of_no_trials_and_is_never_sure() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)
    assert wilson(0, 30).low == 0.0
    assert 0.1 < wilson(0, 30).high < 0.13


@pytest.mark.parametrize(("successes", "trials", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses_impossible_counts_and_levels(successes: int, trials: int, level: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <"):
        wilson(successes, trials, level=level)


def test_bootstrap_is_the_same_for_the_same_generator() -> None:
    numerators, denominators, groups = [1.0, 0, 1, 0, 0, 1], [1.0, 1, 1, 0, 1, 1], list("aabbcd")
    first = cluster_ratio(numerators, denominators, groups, generator=generator(3))
    assert first == cluster_ratio(numerators, denominators, groups, generator=generator(3))


def test_bootstrap_of_few_groups_matches_all_resamples() -> None:
    # Three groups have 27 equally likely resamples: the percentiles are known exactly.
    sums = {"a": (0, 2), "b": (1, 3), "c": (4, 5)}
    ratios = sorted(
        sum(sums[g][0] for g in drawn) / sum(sums[g][1] for g in drawn) for drawn in product("abc", repeat=3)
    )
    rows = [(1.0 if k < top else 0.0, 1.0, g) for g, (top, bottom) in sums.items() for k in range(bottom)]
    interval = cluster_ratio(*zip(*rows, strict=True), generator=generator(), resamples=50_000, level=0.9)
    assert interval is not None
    assert interval.low in (pytest.approx(ratios[1]), pytest.approx(ratios[2]))
    assert interval.high == pytest.approx(ratios[25])


def test_repeating_each_observation_in_its_group_narrows_nothing() -> None:
    outcomes = torch.randint(2, (60,), generator=generator(1)).tolist()
    once = cluster_ratio(outcomes, [1.0] * 60, range(60), generator=generator())
    fivefold = cluster_ratio(outcomes * 5, [1.0] * 300, list(range(60)) * 5, generator=generator())
    apart = cluster_ratio(outcomes * 5, [1.0] * 300, range(300), generator=generator())
    assert once == fivefold
    assert once is not None
    assert apart is not None
    assert apart.high - apart.low < 0.6 * (once.high - once.low)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_bootstrap_that_cannot_vary_claims_no_certainty(outcome: float) -> None:
    groups = [index // 2 for index in range(60)]
    interval = cluster_ratio([outcome] * 60, [1.0] * 60, groups, generator=generator())
    assert interval == wilson(int(30 * outcome), 30)


def test_one_group_alone_says_next_to_nothing() -> None:
    interval = cluster_ratio([1.0, 0.0], [1.0, 1.0], ["a", "a"], generator=generator())
    assert interval is not None
    assert interval.low < 0.1
    assert interval.high > 0.9


def test_no_denominator_has_no_interval() -> None:
    assert cluster_ratio([0.0, 0.0], [0.0, 0.0], "ab", generator=generator()) is None
    assert cluster_ratio([], [], [], generator=generator()) is None


def test_bootstrap_refuses_columns_of_different_length() -> None:
    with pytest.raises(ValueError, match="lengths differ"):
        cluster_ratio([1.0], [1.0, 1.0], "ab", generator=generator())


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    # 60 originals with 1 to 3 pairs each, as AdvGLUE has, each original with a rate of its own around 0.4.
    draw = generator(5)
    covered = 0
    for trial in range(200):
        rates = torch.rand(60, generator=draw) * 0.8
        sizes = torch.randint(1, 4, (60,), generator=draw)
        groups = torch.repeat_interleave(torch.arange(60), sizes)
        broken = (torch.rand(len(groups), generator=draw) < rates[groups]).double()
        interval = cluster_ratio(
            broken.tolist(), [1.0] * len(groups), groups.tolist(), generator=generator(trial), resamples=400
        )
        assert interval is not None
        covered += interval.low <= 0.4 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("first", "second", "p"), [(0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (0, 6, 2 / 64)])
def test_mcnemar_is_the_two_sided_sign_test(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(p)


def test_mcnemar_of_thousands_neither_overflows_nor_takes_negative_counts() -> None:
    assert 0 < mcnemar(2000, 2200) < 0.01
    with pytest.raises(ValueError, match="counts >= 0"):
        mcnemar(-1, 3)
