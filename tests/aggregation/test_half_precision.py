"""The geometric median from rounded products against the one from exact products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat import geometry
from fedeat.aggregation import aggregate, geometric_median, half_precision
from fedeat.aggregation.half_precision import half_precision_median
from fedeat.errors import UpdateError
from fedeat.geometry import products
from fedeat.geometry.sources import open_updates

CLIENTS, COORDINATES = 41, 140_000
UNIFORM = torch.full((CLIENTS,), 1 / CLIENTS, dtype=torch.float64)


def draw(kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    updates = normal(CLIENTS, COORDINATES)
    few = CLIENTS // 3
    if kind == "one direction":
        updates[:few] += 3 * normal(COORDINATES)
    elif kind == "huge":
        updates[:few] *= 1e6
    elif kind == "common part":
        updates += 1.5 * normal(COORDINATES)
    elif kind == "one coordinate":
        updates[torch.arange(few), torch.arange(few)] = 1e5
    elif kind == "sparse":
        updates *= torch.rand(COORDINATES, generator=generator) < 0.01
    elif kind == "few directions":
        updates = normal(CLIENTS, 8) @ normal(8, COORDINATES) + 0.1 * updates
    elif kind == "all sizes":
        updates *= torch.logspace(-2, 2, CLIENTS)[:, None]
    return updates


KINDS = [
    "alike",
    "one direction",
    "huge",
    "common part",
    "one coordinate",
    "sparse",
    "few directions",
    "all sizes",
]


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the routine does, on processors that cannot."""
    if products.HALF_PRECISION:
        return

    def half_gram(source: Any, whole: int) -> tuple[Tensor, float]:
        exact, rounded = geometry.gram(source), geometry.gram(source.rows.bfloat16())
        along = (source.rows.double() * source.rows.bfloat16().double()).sum(1) / exact.diagonal()
        rounded = torch.where(torch.eye(len(exact), dtype=torch.bool), exact, rounded / torch.outer(along, along))
        sizes = exact.diagonal().sqrt()
        return rounded, float(((rounded[whole] - exact[whole]).abs() / (sizes * sizes[whole])).max())

    monkeypatch.setattr(products, "HALF_PRECISION", True)
    monkeypatch.setattr(half_precision, "half_gram", half_gram)


@pytest.fixture
def in_full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Aggregates as a processor without half precision does."""

    def run(*given: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(products, "HALF_PRECISION", False)
            return aggregate(*given, **options)

    return run


def excess(updates: Tensor, weights: Tensor) -> float:
    doubles = updates.double() - updates[-1].double()
    best = geometric_median(doubles @ doubles.T, UNIFORM).weights

    def objective(weights: Tensor) -> float:
        return float(torch.linalg.vector_norm(doubles - weights @ doubles, dim=1).mean())

    return objective(weights) / objective(best) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_it_is_as_good_as_with_exact_products_and_its_gap_is_a_bound(kind: str, seed: int) -> None:
    updates = draw(kind, seed)
    found = half_precision_median(open_updates(updates), UNIFORM)
    assert found is not None
    decided, readings, point = found
    assert readings <= 3
    assert decided.converged
    assert excess(updates, decided.weights) <= min(1e-12, decided.gap)
    assert decided.gap <= decided.majority_gap
    torch.testing.assert_close(point, (decided.weights @ updates.double()).float())


def test_aggregate_takes_it_and_says_the_same_as_in_full(in_full: Callable[..., Any]) -> None:
    updates, prior = draw("one direction"), torch.linspace(1, 3, CLIENTS, dtype=torch.float64)
    half, full = aggregate(updates, prior_weights=prior), in_full(updates, prior_weights=prior)
    torch.testing.assert_close(half.weights, full.weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(half.value, full.value, atol=1e-5, rtol=0)
    assert half.objective == pytest.approx(full.objective, rel=1e-7)
    assert not torch.equal(half.weights, full.weights)


def test_columns_of_a_matrix_are_aggregated_as_its_rows_are() -> None:
    updates = draw("one direction")
    strided = torch.stack([updates, updates], dim=2).flatten(1)[:, ::2]
    for gaps in (updates.T.contiguous().T, strided):
        torch.testing.assert_close(aggregate(gaps).value, aggregate(updates).value, atol=1e-5, rtol=0)
    alike = torch.linspace(1, 2, CLIENTS)[:, None].expand(CLIENTS, COORDINATES)
    assert aggregate(alike).converged


@pytest.mark.parametrize(
    "kind",
    ["few clients", "few coordinates", "float64", "shifted", "on a line", "best is an update", "tiny", "not finite"],
)
def test_what_rounded_products_cannot_tell_is_left_to_exact_ones(kind: str) -> None:
    updates = draw("alike")
    if kind == "few clients":
        updates = updates[:20]
    elif kind == "few coordinates":
        updates = updates[:, :1000]
    elif kind == "float64":
        updates = updates.double()
    elif kind == "shifted":
        updates += 10
    elif kind == "on a line":
        updates = torch.linspace(-1, 2, CLIENTS)[:, None] * updates[:1]
    elif kind == "best is an update":
        updates[: CLIENTS // 2 + 1] = updates[0].clone()
    elif kind == "tiny":
        updates *= 1e-25
    elif kind == "not finite":
        updates[5, 77] = math.inf
    prior = torch.full((len(updates),), 1 / len(updates), dtype=torch.float64)
    assert half_precision_median(open_updates(updates), prior) is None
    if kind == "not finite":
        with pytest.raises(UpdateError, match="client 5"):
            aggregate(updates)
    else:
        assert aggregate(updates).converged


def test_a_tolerance_that_it_cannot_prove_is_left_to_exact_products() -> None:
    assert half_precision_median(open_updates(draw("one direction")), UNIFORM, tolerance=1e-14) is None
