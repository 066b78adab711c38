"""Product space against inner products of explicitly formed d x k matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedeat.aggregation import aggregate
from fedeat.errors import UpdateError
from fedeat.geometry.layout import Spec
from fedeat.geometry.product_space import Lora, pairs, product_gram
from fedeat.geometry.sources import open_updates

A, B = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"
HEAD = "classifier.weight"


def adapter(seed: int, *, size: float = 1.0, rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, 11), B: (7, rank), HEAD: (2, 5)}
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def true_update(update: dict[str, Tensor], reference: dict[str, Tensor] | None, scaling: float) -> Tensor:
    zero = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    base = {name: tensor.double() for name, tensor in (reference or zero).items()}
    local = {name: base[name] + update[name].double() for name in update}
    product = scaling * (local[B] @ local[A] - base[B] @ base[A])
    return torch.cat([product.flatten(), update[HEAD].double().flatten()])


@pytest.mark.parametrize("with_reference", [False, True])
def test_inner_products_are_those_of_the_true_updates(with_reference: bool) -> None:
    updates = [adapter(seed, size=0.1) for seed in range(5)]
    reference = adapter(99) if with_reference else None
    rows = torch.stack([true_update(update, reference, 2.0) for update in updates])
    found = product_gram(open_updates(updates), Lora(reference, 2.0, [2.0] * 5, reference is None))
    torch.testing.assert_close(found.gram, rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_small_updates_of_a_large_adapter_keep_their_digits() -> None:
    updates = [{name: tensor.double() for name, tensor in adapter(seed, size=1e-7).items()} for seed in range(5)]
    reference = {name: tensor.double() for name, tensor in adapter(99).items()}
    base_a, base_b = reference[A], reference[B]
    rows = torch.stack(
        [torch.cat([(u[B] @ (base_a + u[A]) + base_b @ u[A]).flatten(), u[HEAD].flatten()]) for u in updates]
    )
    found = product_gram(open_updates(updates), Lora(reference, 1.0, [1.0] * 5, False))
    torch.testing.assert_close(found.gram * 1e14, rows @ rows.T * 1e14, rtol=1e-10, atol=1e-10)


def test_weights_do_not_depend_on_how_factors_are_scaled_or_rotated() -> None:
    updates = [adapter(seed) for seed in range(6)]
    changed = []
    for seed, update in enumerate(updates):
        generator = torch.Generator().manual_seed(1000 + seed)
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0] * (1 + seed)
        a = torch.linalg.solve(rotation, update[A].double()).float()
        changed.append({A: a, B: (update[B].double() @ rotation).float(), HEAD: update[HEAD]})
    plain, gauged = aggregate(updates, space="product"), aggregate(changed, space="product")
    torch.testing.assert_close(gauged.weights, plain.weights, atol=1e-5, rtol=0)
    factors = aggregate(changed).weights
    assert float((factors - aggregate(updates).weights).abs().max()) > 1e-2


def test_product_weights_are_the_median_of_the_true_updates_and_combine_factors() -> None:
    updates, reference = [adapter(seed, size=0.2) for seed in range(6)], adapter(99)
    rows = torch.stack([true_update(update, reference, 0.5) for update in updates])
    result = aggregate(updates, space="product", reference=reference, scaling=0.5)
    expected = aggregate(rows)
    torch.testing.assert_close(result.weights, expected.weights, atol=1e-9, rtol=0)
    combined = sum(w * u[B] for w, u in zip(result.weights.tolist(), updates, strict=True))
    torch.testing.assert_close(result.value[B], combined)


def test_tensors_without_pairs_count_as_they_are() -> None:
    updates = [{HEAD: adapter(seed)[HEAD]} for seed in range(5)]
    torch.testing.assert_close(aggregate(updates, space="product").weights, aggregate(updates).weights)


@pytest.mark.parametrize("name", ["x.lora_{}.weight", "x.lora_{}.default.weight", "x.lora_embedding_{}", "x.lora_{}"])
def test_peft_names_are_paired(name: str) -> None:
    layout = {name.format("A"): Spec((2, 5), torch.float32), name.format("B"): Spec((7, 2), torch.float32)}
    found, others = pairs(layout)
    assert [(pair.a, pair.b) for pair in found] == [(name.format("A"), name.format("B"))]
    assert others == []


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UpdateError, match="no partner"):
        aggregate([{A: torch.ones(3, 4)}], space="product")
    with pytest.raises(UpdateError, match="no LoRA pair"):
        aggregate([{A: torch.ones(3, 4), B: torch.ones(7, 2)}], space="product")


def test_bad_references_and_scalings_are_refused() -> None:
    updates = [adapter(seed) for seed in range(3)]
    reference = adapter(9)
    with pytest.raises(UpdateError, match="reference misses"):
        aggregate(updates, space="product", reference={A: reference[A]})
    with pytest.raises(UpdateError, match="shape"):
        aggregate(updates, space="product", reference={**reference, A: torch.ones(2, 2)})
    with pytest.raises(UpdateError, match="NaN"):
        aggregate(updates, space="product", reference={**reference, A: reference[A] * float("nan")})
    for scaling in (0.0, float("nan"), [1.0, 2.0]):
        with pytest.raises(UpdateError, match="scaling"):
            aggregate(updates, space="product", scaling=scaling)


def test_nan_in_a_factor_is_named() -> None:
    updates = [adapter(seed) for seed in range(3)]
    updates[2][B][0, 0] = float("nan")
    with pytest.raises(UpdateError, match="client 2"):
        aggregate(updates, space="product")
