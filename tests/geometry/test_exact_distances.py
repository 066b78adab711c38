"""Distances from a weighted sum, however the updates are held, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedeat.geometry import products
from fedeat.geometry.exact_distances import distances_from_sum
from fedeat.geometry.sources import open_updates


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["matrix", "mappings"])
@pytest.mark.parametrize("common", [0.0, 100.0])
def test_distances_and_sum_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: torch.dtype, kind: str, common: float
) -> None:
    if compiled and not products.COMPILED:
        pytest.skip("installed without a compiler")
    monkeypatch.setattr(products, "COMPILED", compiled)
    generator = torch.Generator().manual_seed(0)
    updates = (torch.randn(7, 20_000, generator=generator) + common).to(dtype)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    weights /= weights.sum()
    given: Any = updates if kind == "matrix" else [{"a": row[:335], "b": row[335:].view(3, -1)} for row in updates]

    distances, value = distances_from_sum(open_updates(given), weights)

    point = weights @ updates.double()
    found = value if isinstance(value, torch.Tensor) else torch.cat([value["a"], value["b"].flatten()])
    torch.testing.assert_close(distances, (updates.double() - point).norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, point.to(dtype))
