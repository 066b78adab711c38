"""Rules on the Gram matrix against direct implementations on the updates."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat.aggregation import rules
from fedeat.aggregation.rules import (
    centred_clipping,
    krum,
    mean,
    minimum_diameter,
    multi_krum,
    norm_filter,
    trusted_reference,
)
from fedeat.errors import UpdateError


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def direct_scores(updates: Tensor, byzantine: int) -> Tensor:
    """Krum's scores by its definition."""
    scores = []
    for i in range(len(updates)):
        others = sorted(float((updates[i] - updates[j]).square().sum()) for j in range(len(updates)) if j != i)
        scores.append(sum(others[: len(updates) - byzantine - 2]))
    return torch.tensor(scores)


def test_mean_returns_the_prior_weights() -> None:
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert mean(torch.eye(2).double(), weights).weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("byzantine", [0, 1, 3])
def test_krum_chooses_the_least_score(byzantine: int) -> None:
    for seed in range(20):
        updates = draw(9, 4, seed)
        weights = krum(updates @ updates.T, prior(9), byzantine=byzantine).weights
        assert int(weights.argmax()) == int(direct_scores(updates, byzantine).argmin())
        assert sorted(weights.tolist())[-2:] == [0.0, 1.0]


def test_multi_krum_averages_the_best_scores() -> None:
    updates = draw(9, 4)
    weights = multi_krum(updates @ updates.T, prior(9), byzantine=2, selected=4).weights
    best = direct_scores(updates, 2).argsort()[:4]
    expected = torch.zeros(9, dtype=torch.float64)
    expected[best] = 0.25
    torch.testing.assert_close(weights, expected)


def test_multi_krum_averages_n_minus_f_minus_2_by_default() -> None:
    updates = draw(11, 4)
    assert int((multi_krum(updates @ updates.T, prior(11), byzantine=2).weights > 0).sum()) == 7


@pytest.mark.parametrize("rule", [krum, multi_krum])
def test_krum_leaves_out_far_clients(rule: Any) -> None:
    updates = draw(11, 4)
    updates[:4] += 100
    weights = functools.partial(rule, byzantine=4)(updates @ updates.T, prior(11)).weights
    assert float(weights[:4].sum()) == 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_clients_are_no_special_case(count: int) -> None:
    updates = draw(count, 3)
    for rule in (krum, multi_krum):
        assert float(rule(updates @ updates.T, prior(count)).weights.sum()) == pytest.approx(1)


def test_clients_of_zero_weight_are_never_chosen() -> None:
    updates = torch.zeros(6, 3, dtype=torch.float64)
    updates[2:] = draw(4, 3)
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert krum(updates @ updates.T, weights).weights[:2].tolist() == [0.0, 0.0]


def test_minimum_diameter_is_the_best_subset_of_all() -> None:
    for seed in range(20):
        updates = draw(9, 4, seed)
        chosen = minimum_diameter(updates @ updates.T, prior(9), byzantine=3).weights > 0
        assert int(chosen.sum()) == 6

        def diameter(clients: list[int], updates: Tensor = updates) -> float:
            return float(torch.pdist(updates[clients]).max())

        best = min(diameter(list(subset)) for subset in itertools.combinations(range(9), 6))
        assert diameter(torch.nonzero(chosen).flatten().tolist()) == pytest.approx(best)


def test_minimum_diameter_leaves_out_a_far_minority_and_keeps_duplicates() -> None:
    updates = draw(9, 4)
    updates[:4] += 50
    assert float(minimum_diameter(updates @ updates.T, prior(9)).weights[:4].sum()) == 0.0
    same = torch.ones(5, 3, dtype=torch.float64)
    assert int((minimum_diameter(same @ same.T, prior(5), byzantine=2).weights > 0).sum()) == 3


def test_a_hopeless_search_is_given_up_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_MOST_BRANCHES", 20)
    updates = draw(120, 50)
    with pytest.raises(UpdateError, match="gave up"):
        minimum_diameter(updates @ updates.T, prior(120))


def test_centred_clipping_equals_its_definition_and_bounds_every_client() -> None:
    updates = draw(8, 5)
    updates[0] *= 1e9
    limit = float(torch.linalg.vector_norm(updates, dim=1).median()) * 0.7
    centre = torch.zeros(5, dtype=torch.float64)
    for _ in range(4):
        away = updates - centre
        centre = centre + (away * (limit / torch.linalg.vector_norm(away, dim=1)).clamp(max=1)[:, None]).mean(0)
    weights = centred_clipping(updates @ updates.T, prior(8), radius=0.7, steps=4).weights
    # The attacker's share of the products carries the rounding of 1e18.
    torch.testing.assert_close(weights @ updates, centre, atol=1e-6, rtol=1e-6)


def test_centred_clipping_with_a_wide_ball_is_the_mean() -> None:
    updates = draw(8, 5)
    weights = centred_clipping(updates @ updates.T, prior(8), radius=1e6).weights
    torch.testing.assert_close(weights, prior(8))


def test_norm_filter_leaves_out_the_longest() -> None:
    updates = draw(7, 5)
    updates[2] *= 100
    updates[5] *= 200
    weights = norm_filter(updates @ updates.T, prior(7), byzantine=2).weights
    assert torch.nonzero(weights == 0).flatten().tolist() == [2, 5]


def test_trusted_reference_equals_its_definition() -> None:
    updates = draw(6, 5) + 0.5
    updates[4] = -3 * updates[0]
    norms = torch.linalg.vector_norm(updates, dim=1)
    trust = (updates @ updates[0] / norms / norms[0]).clamp_min(0)
    trust[0] = 0
    expected = (trust[:, None] * updates / norms[:, None] * norms[0]).sum(0) / trust.sum()
    weights = trusted_reference(updates @ updates.T, prior(6), reference=0).weights
    torch.testing.assert_close(weights @ updates, expected)
    assert float(weights[4]) == 0.0


def test_trusted_reference_alone_decides_when_all_others_oppose_it() -> None:
    updates = torch.cat([torch.ones(1, 3), -torch.ones(3, 3)]).double()
    assert trusted_reference(updates @ updates.T, prior(4), reference=0).weights.tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), True])
def test_a_radius_that_is_not_positive_is_refused(bad: Any) -> None:
    with pytest.raises(UpdateError, match="radius must be a positive"):
        centred_clipping(torch.eye(3).double(), prior(3), radius=bad)
