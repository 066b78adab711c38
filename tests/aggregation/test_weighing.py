"""What a rule decides: gaps that stay bounds however products are rounded, and what a rule may return."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from fedeat import aggregation
from fedeat.aggregation import ClientWeights, aggregate, geometric_median
from fedeat.errors import UpdateError


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_large_float32_updates_match_float64_ones() -> None:
    updates = draw(9, 150_000)
    updates[:4] *= 1e6
    exact = aggregate(updates.double())
    result = aggregate(updates)
    torch.testing.assert_close(result.weights, exact.weights, atol=1e-7, rtol=0)
    prior = torch.full((9,), 1 / 9, dtype=torch.float64)
    reached = torch.linalg.vector_norm(updates.double() - result.weights @ updates.double(), dim=1) @ prior
    assert float(reached) / exact.objective - 1 <= min(1e-12, result.gap)


def test_a_median_close_to_one_client_is_found_in_float64() -> None:
    """Float32 products are too coarse for a distance of a thousandth of the spread; the result must not be."""
    updates = draw(9, 150_000, seed=3)
    updates[0] = updates[1:].mean(0) + 1e-4 * updates[0]
    exact, result = aggregate(updates.double()), aggregate(updates)
    torch.testing.assert_close(result.weights, exact.weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["alike", "common", "attacked", "near"])
def test_the_gap_of_float32_products_is_still_a_bound(kind: str) -> None:
    for seed in range(4):
        updates = draw(12, 60_000, seed)
        if kind == "common":
            updates += 3 * draw(1, 60_000, seed + 100)
        elif kind == "attacked":
            updates[:5] *= 1e4
        elif kind == "near":
            updates[0] = updates[1:].mean(0) + 0.02 * updates[0]
        result = aggregate(updates)
        exact = aggregate(updates.double())
        point = result.weights @ updates.double()
        reached = float(torch.linalg.vector_norm(updates.double() - point, dim=1).mean())
        assert reached / exact.objective - 1 <= result.gap <= 1e-9


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("drift", [1e-2, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9])
def test_the_gap_in_product_space_knows_what_cancels_between_whole_adapters(
    drift: float, dtype: torch.dtype, with_reference: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    names, shapes = ("m.0.lora_A.weight", "m.0.lora_B.weight"), ((4, 32), (24, 4))

    def noise() -> dict[str, Tensor]:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return dict(zip(names, drawn, strict=True))

    base = noise()
    for _ in range(5):
        moved = [noise() for _ in range(7)]
        wholes = [{name: (base[name] + drift * tensor[name]).to(dtype) for name in names} for tensor in moved]
        result = aggregate(wholes, space="product", whole=True, reference=base if with_reference else None)
        factors = [[whole[name].double() for name in names] for whole in wholes]
        rows = torch.stack([(b @ a - base[names[1]] @ base[names[0]]).flatten() for a, b in factors])
        exact = aggregate(rows)
        reached = float(torch.linalg.vector_norm(rows - result.weights @ rows, dim=1).mean())
        assert reached / exact.objective - 1 <= result.gap
        assert result.converged == (result.gap <= 1e-9)
        assert drift < 1e-3 or result.gap < 1e-12


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("drift", [1e-2, 1e-6, 1e-8])
@pytest.mark.parametrize(
    "step",
    [
        aggregation.nearest_neighbour_mixing,
        functools.partial(aggregation.nearest_neighbour_mixing, byzantine=1),
        functools.partial(aggregation.bucketing, generator=torch.Generator().manual_seed(0)),
        aggregation.norm_clipping,
    ],
    ids=["mixing", "mixing of nearly all", "buckets", "clipping"],
)
def test_the_gap_behind_steps_knows_what_cancels_between_whole_adapters(
    step: aggregation.Step, drift: float, with_reference: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    names, shapes = ("m.0.lora_A.weight", "m.0.lora_B.weight"), ((4, 32), (24, 4))
    base = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made: list[aggregation.Mixing] = []

    def remembered(gram: Tensor, prior_weights: Tensor) -> aggregation.Mixing:
        made.append(step(gram, prior_weights))
        return made[-1]

    for _ in range(5):
        moved = [
            [part + drift * torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in base]
            for _ in range(7)
        ]
        wholes = [dict(zip(names, factors, strict=True)) for factors in moved]
        rule = aggregation.chain(remembered, rule=geometric_median)
        reference = dict(zip(names, base, strict=True)) if with_reference else None
        result = aggregate(wholes, rule=rule, space="product", whole=True, reference=reference)
        zero = base[1] @ base[0] if with_reference else torch.zeros(24, 32, dtype=torch.float64)
        rows = torch.stack([(b @ a - zero).flatten() for a, b in moved])
        mixing = made[-1]
        mixed = mixing.matrix @ rows
        exact = aggregate(mixed, prior_weights=mixing.prior_weights)
        reached = torch.linalg.vector_norm(mixed - result.weights @ rows, dim=1) @ mixing.prior_weights
        assert result.gap == math.inf or float(reached) <= (1 + result.gap) * exact.objective
        assert result.converged == (result.gap <= 1e-9)
        assert drift < 1e-3 or result.gap < 1e-12


def test_a_looser_tolerance_lets_a_wider_gap_count_as_converged() -> None:
    base, names = draw(2, 60), ("m.0.lora_A.weight", "m.0.lora_B.weight")
    shapes = ((4, 15), (15, 4))
    wholes = [
        {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        for parts in (base + 1e-6 * draw(2, 60, seed) for seed in range(1, 8))
    ]
    strict = aggregate(wholes, space="product")
    loose = aggregate(wholes, space="product", rule=functools.partial(geometric_median, tolerance=1e-2))
    assert (strict.converged, loose.converged) == (False, True)
    assert strict.gap > 1e-9


def constant(gram: Tensor, prior_weights: Tensor, *, weights: Tensor) -> ClientWeights:
    return ClientWeights(weights)


def test_a_rule_that_returns_nonsense_is_refused() -> None:
    for weights in (torch.tensor([1.0, math.nan]).double(), torch.ones(3).double()):
        with pytest.raises(UpdateError, match="finite weights"):
            aggregate(draw(2, 4), rule=functools.partial(constant, weights=weights))


@pytest.mark.parametrize("weights", [torch.tensor(0.25).expand(4), torch.full((4,), 0.25), torch.tensor([0, 0, 1, 0])])
def test_a_rule_may_return_weights_of_any_dtype_and_stride(weights: Tensor) -> None:
    updates = draw(4, 200_000)
    result = aggregate(updates, rule=functools.partial(constant, weights=weights))
    assert result.weights.dtype == torch.float64
    torch.testing.assert_close(result.weights, weights.double())
    torch.testing.assert_close(result.value, (weights.double() @ updates.double()).float())
