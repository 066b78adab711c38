"""Inner products and combinations against direct float64 computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedeat import geometry
from fedeat.errors import UpdateError
from fedeat.geometry import products
from fedeat.geometry.distances import squared_distances
from fedeat.geometry.gram_matrix import half_gram
from fedeat.geometry.sources import open_updates


def draw(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def as_dicts(updates: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The same updates as adapters of three tensors, one of them stored transposed."""
    cut = updates.shape[1] // 2 // 6 * 6
    return [{"a": row[:cut].reshape(6, -1), "b": row[cut:-1].clone().reshape(1, -1).T, "c": row[-1]} for row in updates]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["matrix", "rows", "dicts"])
def test_gram_equals_direct_products(dtype: torch.dtype, kind: str) -> None:
    updates = draw(7, 70_001).to(dtype)
    expected = updates.double() @ updates.double().T
    given: Any = {"matrix": updates, "rows": list(updates), "dicts": as_dicts(updates)}[kind]
    torch.testing.assert_close(geometry.gram(given), expected, rtol=1e-6, atol=0.02)
    torch.testing.assert_close(geometry.gram(given, double=True), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("count", [1, 47, 48, 101])
def test_gram_of_many_clients_is_symmetric_and_right(count: int) -> None:
    updates = draw(count, 5000)
    found = geometry.gram(updates)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, updates.double() @ updates.double().T, rtol=1e-6, atol=0.005)


@pytest.mark.parametrize("centre", [0, 4])
def test_centred_gram_equals_products_of_differences(centre: int) -> None:
    updates = draw(5, 40_000) + 1000
    differences = updates.double() - updates[centre].double()
    expected = differences @ differences.T
    torch.testing.assert_close(geometry.gram(updates, centre=centre), expected, rtol=1e-6, atol=0.05)
    torch.testing.assert_close(geometry.gram(as_dicts(updates), centre=centre), expected, rtol=1e-6, atol=0.05)


@pytest.mark.skipif(not products.HALF_PRECISION, reason="a processor without AVX512-BF16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["matrix", "rows", "dicts"])
def test_half_precision_products_tell_how_wrong_they_are(dtype: torch.dtype, kind: str) -> None:
    updates = draw(40, 70_001).to(dtype)
    expected = updates.double() @ updates.double().T
    given: Any = {"matrix": updates, "rows": list(updates), "dicts": as_dicts(updates)}[kind]
    found, error = half_gram(open_updates(given), 3)
    sizes = expected.diagonal().sqrt()
    wrong = float(((found - expected).abs() / torch.outer(sizes, sizes)).max())
    assert error <= 1.1 * wrong
    assert wrong <= (4 * error if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("kind", ["matrix", "rows", "dicts"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combination_equals_the_weighted_sum_and_keeps_kind_and_dtype(dtype: torch.dtype, kind: str) -> None:
    updates = draw(6, 300_001).to(dtype)
    weights = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (weights @ updates.double()).to(dtype)
    if kind == "dicts":
        given = as_dicts(updates)
        value = geometry.combine(given, weights)
        assert isinstance(value, dict)
        assert {name: t.shape for name, t in value.items()} == {name: t.shape for name, t in given[0].items()}
        value = torch.cat([value["a"].flatten(), value["b"].flatten(), value["c"].flatten()])
    else:
        value = geometry.combine(updates if kind == "matrix" else list(updates), weights)
    assert isinstance(value, torch.Tensor)
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected)


def test_combination_about_a_client_keeps_the_digits_of_small_differences() -> None:
    base = 1e6 + torch.arange(400_000) % 7
    updates = base + draw(3, 400_000).round()
    weights = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    expected = weights @ updates.double()
    value = geometry.combine(updates, weights, centre=1)
    assert isinstance(value, torch.Tensor)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=0.04)


def test_tiny_coefficients_of_huge_updates_are_not_lost() -> None:
    updates = torch.stack([torch.full((600_000,), 1e-12), torch.full((600_000,), 1e38)])
    value = geometry.combine(updates, torch.tensor([1.0, 1e-50], dtype=torch.float64))
    assert isinstance(value, torch.Tensor)
    torch.testing.assert_close(value, torch.full((600_000,), 2e-12))


def test_weight_one_returns_that_update_bit_for_bit() -> None:
    updates = draw(3, 20)
    updates[1, 0] = -0.0
    value = geometry.combine(as_dicts(updates), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    assert isinstance(value, dict)
    assert all(torch.equal(value[name], as_dicts(updates)[1][name]) for name in value)
    assert bool(torch.signbit(value["a"].flatten()[0]))


def test_measure_recentres_when_updates_share_a_large_part() -> None:
    """Float32 products about zero would lose the differences altogether: 1e4 is 1e4 spreads away."""
    updates = draw(8, 150_000)
    updates += 1e4 * draw(1, 150_000, seed=9)
    prior = torch.full((8,), 1 / 8, dtype=torch.float64)
    found = geometry.measure(updates, prior)
    assert found.centre is not None
    exact = squared_distances(geometry.gram(updates, centre=0, double=True))
    torch.testing.assert_close(squared_distances(found.gram), exact, rtol=1e-5, atol=0)


def test_a_huge_minority_triggers_no_second_reading() -> None:
    updates = draw(10, 150_000)
    updates[:4] *= 1e8
    found = geometry.measure(updates, torch.full((10,), 0.1, dtype=torch.float64))
    assert (found.centre, found.passes) == (None, 1)


def test_an_origin_that_counts_stays_the_reference() -> None:
    updates = draw(8, 150_000) + 1e4
    found = geometry.measure(updates, torch.full((8,), 1 / 8, dtype=torch.float64), origin=True)
    assert found.centre is None
    torch.testing.assert_close(found.gram, updates.double() @ updates.double().T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e25, 1e30])
def test_float32_updates_out_of_the_range_of_float32_products_are_measured_in_float64(size: float) -> None:
    updates = draw(6, 200_000) * size
    found = geometry.measure(updates, torch.full((6,), 1 / 6, dtype=torch.float64))
    exact = updates.double() @ updates.double().T
    torch.testing.assert_close(found.gram / size**2, exact / size**2, rtol=1e-9, atol=1e-3)


def test_updates_with_nan_or_infinity_are_named() -> None:
    for width in (10, 300_000):
        updates = draw(5, width)
        updates[1, 3] = float("nan")
        updates[4, 5] = float("inf")
        with pytest.raises(UpdateError, match=r"client 1: .*NaN(.|\n)*client 4"):
            geometry.measure(updates, torch.full((5,), 0.2, dtype=torch.float64))


def test_an_update_beyond_the_range_of_float64_is_named() -> None:
    updates = draw(5, 10).double()
    updates[2] *= 1e200
    with pytest.raises(UpdateError, match=r"client 2 .*beyond the range"):
        geometry.measure(updates, torch.full((5,), 0.2, dtype=torch.float64))


def test_arguments_are_not_written_to() -> None:
    updates = draw(5, 300_000) + 100
    before = updates.clone()
    prior = torch.full((5,), 0.2, dtype=torch.float64)
    found = geometry.measure(updates, prior)
    geometry.combine(updates, prior, centre=found.centre)
    assert torch.equal(updates, before)
