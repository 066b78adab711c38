"""Coordinate-wise rules against definitions written per coordinate."""

from __future__ import annotations

import functools
import statistics

import pytest
import torch
from torch import Tensor

from fedeat.aggregation import aggregate
from fedeat.aggregation.coordinatewise import coordinate_median, coordinate_rule, mean_around_median, trimmed_mean


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_the_median_of_each_coordinate(count: int) -> None:
    updates = draw(count, 30)
    expected = [statistics.median(column.tolist()) for column in updates.T]
    torch.testing.assert_close(aggregate(updates, rule=coordinate_median).value, torch.tensor(expected).double())


@pytest.mark.parametrize("trim", [0, 1, 3])
def test_trimmed_mean_leaves_out_the_ends_of_each_coordinate(trim: int) -> None:
    updates = draw(8, 30)
    expected = updates.sort(0).values[trim : 8 - trim].mean(0)
    value = aggregate(updates, rule=functools.partial(trimmed_mean, byzantine=trim)).value
    torch.testing.assert_close(value, expected)


def test_mean_around_median_keeps_the_nearest() -> None:
    updates = draw(7, 30)
    expected = []
    for column in updates.T.tolist():
        middle = statistics.median(column)
        expected.append(statistics.mean(sorted(column, key=lambda value: abs(value - middle))[:5]))
    value = aggregate(updates, rule=functools.partial(mean_around_median, byzantine=2)).value
    torch.testing.assert_close(value, torch.tensor(expected).double())


@pytest.mark.parametrize("rule", [coordinate_median, trimmed_mean, mean_around_median])
def test_equal_weights_are_the_same_as_no_weights_and_weights_act_as_repetition(rule: object) -> None:
    updates = draw(5, 40)
    repeated = torch.cat([updates, updates[:2]])
    weighted = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    if rule is coordinate_median:
        expected = aggregate(repeated, rule=coordinate_median).value
        torch.testing.assert_close(aggregate(updates, rule=coordinate_median, prior_weights=weighted).value, expected)
    bound = coordinate_rule(rule)
    assert bound is not None
    values, shares = bound(updates, weighted)
    assert float(shares.sum()) == pytest.approx(40)
    assert bool((values <= updates.max(0).values).all())
    assert bool((values >= updates.min(0).values).all())


def test_weighted_median_of_half_the_weight_is_the_middle() -> None:
    columns = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    assert coordinate_median(columns, torch.tensor([1.0, 1.0, 2.0]).double()).tolist() == [3.0]


def test_shares_count_whose_coordinates_were_taken() -> None:
    updates = torch.tensor([[0.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0, 1.0]])
    assert aggregate(updates, rule=coordinate_median).weights.tolist() == [0.0, 0.75, 0.25]


def test_partials_of_partials_are_unwrapped() -> None:
    rule = functools.partial(functools.partial(trimmed_mean, byzantine=0), byzantine=1)
    updates = draw(5, 6)
    torch.testing.assert_close(aggregate(updates, rule=rule).value, updates.sort(0).values[1:4].mean(0))
    assert coordinate_rule(functools.partial(statistics.mean)) is None


def test_values_near_the_largest_float_do_not_overflow() -> None:
    columns = torch.tensor([[3e38], [3.2e38]])
    assert bool(torch.isfinite(coordinate_median(columns, torch.ones(2).double())).all())
    assert bool(torch.isfinite(trimmed_mean(columns, torch.ones(2).double(), byzantine=0)).all())


@pytest.mark.parametrize("rule", [coordinate_median, trimmed_mean])
def test_clients_with_equal_values_share_the_credit(rule: object) -> None:
    bound = coordinate_rule(rule)
    assert bound is not None
    columns = torch.tensor([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0], [1.0, 7.0], [1.0, 0.0]])
    _, shares = bound(columns, torch.ones(5, dtype=torch.float64))
    assert float(shares.sum()) == pytest.approx(2)
    assert shares[0] == shares[1] == shares[2]
    assert float(shares[3]) == float(shares[4]) == pytest.approx(0.2)


@pytest.mark.parametrize("trim", [0, 2, 3])
def test_trimmed_mean_credits_those_it_keeps(trim: int) -> None:
    updates = draw(7, 50)
    bound = coordinate_rule(functools.partial(trimmed_mean, byzantine=trim))
    assert bound is not None
    _, shares = bound(updates, torch.ones(7, dtype=torch.float64))
    kept = updates.argsort(0)[trim : 7 - trim]
    torch.testing.assert_close(shares, torch.bincount(kept.flatten(), minlength=7).double() / (7 - 2 * trim))
