"""Rules on the Gram matrix against direct implementations on the updates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat.rules import krum, mean, multi_krum


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
