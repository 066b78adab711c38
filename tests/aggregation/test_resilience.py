"""What is claimed of each rule, that the claims about shifts hold, and what a rule is with fewer updates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fedeat.aggregation import aggregate, resting_place, tolerates, turning_share
from fedeat.aggregation.coordinatewise import coordinate_median, trimmed_mean
from fedeat.aggregation.preaggregation import (
    adaptive_clipping,
    bucketing,
    chain,
    nearest_neighbour_mixing,
    norm_clipping,
)
from fedeat.aggregation.resilience import fitted, shift_invariant
from fedeat.aggregation.rules import (
    centred_clipping,
    krum,
    mean,
    minimum_diameter,
    multi_krum,
    norm_filter,
    trusted_reference,
)
from fedeat.aggregation.smoothed import smoothed_geometric_median
from fedeat.aggregation.weiszfeld import geometric_median
from fedeat.errors import UpdateError


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        (mean, {1: 0, 10: 0}),
        (geometric_median, {1: 0, 2: 0, 3: 1, 9: 4, 10: 4}),
        (smoothed_geometric_median, {10: 4}),
        (coordinate_median, {10: 4, 11: 5}),
        (krum, {1: 0, 4: 0, 5: 1, 10: 3, 11: 4}),
        (functools.partial(multi_krum, byzantine=2), {5: 1, 10: 2}),
        (functools.partial(multi_krum, selected=9), {9: 0, 10: 1, 12: 3, 20: 8}),
        (functools.partial(multi_krum, selected=5, byzantine=2), {5: 0, 6: 1, 9: 2}),
        (minimum_diameter, {9: 4}),
        (norm_filter, {9: 2}),
        (centred_clipping, {9: 0, 25: 2}),
        (functools.partial(trusted_reference, reference=0), {10: 9}),
        (trimmed_mean, {5: 1, 10: 2}),
        (functools.partial(trimmed_mean, byzantine=4), {10: 4, 5: 2}),
        (chain(nearest_neighbour_mixing, rule=geometric_median), {10: 4}),
        (chain(functools.partial(nearest_neighbour_mixing, byzantine=2), rule=krum), {10: 2}),
        (chain(functools.partial(bucketing, size=2), rule=geometric_median), {10: 2, 20: 4}),
        (chain(norm_clipping, rule=mean), {10: 0}),
        (lambda gram, prior: mean(gram, prior), {10: 4}),
    ],
)
def test_each_rule_says_how_many_attackers_it_withstands(rule: Any, counts: dict[int, int]) -> None:
    assert {clients: tolerates(rule, clients) for clients in counts} == counts


@pytest.mark.parametrize(
    "rule",
    [
        mean,
        geometric_median,
        smoothed_geometric_median,
        krum,
        multi_krum,
        minimum_diameter,
        chain(nearest_neighbour_mixing, rule=krum),
        chain(nearest_neighbour_mixing, rule=geometric_median),
        norm_filter,
        functools.partial(centred_clipping, radius=0.5),
        functools.partial(trusted_reference, reference=0),
        chain(adaptive_clipping, rule=mean),
    ],
)
def test_rules_said_to_ignore_shifts_do_and_others_do_not(rule: Any) -> None:
    updates = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = updates + torch.tensor([3.0, -4.0, 5.0, 6.0, 7.0])
    prior = torch.full((9,), 1 / 9, dtype=torch.float64)
    before, after = rule(updates @ updates.T, prior).weights, rule(shifted @ shifted.T, prior).weights
    assert bool((before - after).abs().max() < 1e-6) == shift_invariant(rule)


def test_multi_krum_takes_in_no_attacker_while_it_leaves_out_as_many_as_there_are() -> None:
    updates = torch.randn(9, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for selected in range(3, 10):
        rule = functools.partial(multi_krum, selected=selected)
        attackers = tolerates(rule, 9)
        sent = updates.clone()
        sent[:attackers] *= 1e6
        assert rule(sent @ sent.T, torch.full((9,), 1 / 9, dtype=torch.float64)).weights[:attackers].sum() == 0


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 4.0])
@pytest.mark.parametrize("distance", [10.0, 1e6])
def test_attackers_of_one_mind_turn_the_median_around_from_the_share_that_is_told(
    spread: float, distance: float
) -> None:
    clients = 40
    threshold = turning_share(spread)
    for attackers in range(1, clients // 2):
        honest = clients - attackers
        away = torch.zeros(attackers, honest + 1, dtype=torch.float64)
        away[:, 0] = -distance
        result = aggregate(torch.cat([_around_a_mean(honest, spread), away]))
        share = attackers / clients
        assert float(result.value[0]) == pytest.approx(resting_place(share, spread), abs=1e-6)
        assert result.value[1:].norm() < 1e-6
        assert share == pytest.approx(threshold) or (float(result.value[0]) < 0) == (share > threshold)


@pytest.mark.parametrize(("attackers", "turned"), [(4, False), (6, True)])
def test_mixing_before_the_median_hardly_moves_the_share_that_turns_it(attackers: int, turned: bool) -> None:
    clients, spread = 20, 3.0
    assert 4 / clients < turning_share(spread) < 1 / (1 + spread) < 6 / clients
    mixing = functools.partial(nearest_neighbour_mixing, byzantine=attackers)
    along = _along_the_mean(chain(mixing, rule=geometric_median), clients, attackers, spread)
    assert (min(along) < 0) == turned
    assert along[-1] > 0  # who stands apart is outvoted


def test_krum_turns_with_far_fewer() -> None:
    along = _along_the_mean(functools.partial(krum, byzantine=1), 20, 1, 3.0)
    assert min(along) < 0
    assert turning_share(3.0) / 4 > 1 / 20


def test_the_median_of_honest_updates_that_agree_turns_at_its_breakdown_point() -> None:
    assert turning_share(0.0) == 0.5
    shares = [turning_share(spread) for spread in (0.0, 0.1, 1.0, 3.0, 1e9)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 1e-8


@pytest.mark.parametrize(
    "rule",
    [
        functools.partial(trimmed_mean, byzantine=4),
        functools.partial(multi_krum, byzantine=3, selected=9),
        chain(functools.partial(nearest_neighbour_mixing, byzantine=4), rule=functools.partial(krum, byzantine=3)),
        chain(
            functools.partial(bucketing, generator=torch.Generator().manual_seed(0), size=9),
            rule=functools.partial(minimum_diameter, byzantine=0),
        ),
    ],
    ids=["cut off", "selected", "mixed", "buckets"],
)
def test_a_rule_meant_for_many_updates_is_fitted_to_any_smaller_number(rule: Any) -> None:
    updates = torch.randn(9, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for count in range(2, 9):
        with pytest.raises(UpdateError, match=r"(byzantine|selected|size) must be an integer"):
            aggregate(updates[:count], rule=rule)
        aggregate(updates[:count], rule=fitted(rule, count))


def _around_a_mean(count: int, spread: float) -> torch.Tensor:
    """(count, count + 1) updates whose mean is the first unit vector: all alike far from it, at right angles to it."""
    residuals = torch.eye(count, dtype=torch.float64) - 1 / count
    residuals *= spread / residuals[0].norm()
    return torch.cat([torch.ones(count, 1, dtype=torch.float64), residuals], 1)


def _along_the_mean(rule: Any, clients: int, attackers: int, spread: float) -> list[float]:
    """What a rule leaves of the honest mean, for attackers at one place ever farther back from it."""
    honest = _around_a_mean(clients - attackers, spread)
    found = []
    for power in range(-8, 20):
        away = torch.zeros(attackers, honest.shape[1], dtype=torch.float64)
        away[:, 0] = 1 - spread * 2 ** (power / 4)
        found.append(float(aggregate(torch.cat([honest, away]), rule=rule).value[0]))
    return found
