"""Weighted sums of products as one adapter, against explicitly formed matrices."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat.aggregation import ClientWeights, aggregate, mean
from fedeat.errors import UpdateError

A, B, HEAD = "base.layers.0.q.lora_A.weight", "base.layers.0.q.lora_B.weight", "score.weight"


def adapter(seed: int, rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, 11), B: (7, rank), HEAD: (2, 5)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def product(value: dict[str, Tensor]) -> Tensor:
    return value[B] @ value[A]


def test_a_stacked_adapter_is_the_exact_weighted_sum_over_ranks_and_scalings() -> None:
    updates = [adapter(seed, rank) for seed, rank in enumerate((2, 3, 5, 4))]
    scaling = [2.0, 1.0, 0.5, 3.0]
    result = aggregate(updates, space="product", scaling=scaling, combine="stacked")
    expected = sum(w * s * product(u) for w, s, u in zip(result.weights.tolist(), scaling, updates, strict=True))
    assert result.value[A].shape == (14, 11)
    ranked = aggregate(updates, space="product", scaling=scaling, combine="stacked", rank=3)  # of recompressed ones
    assert torch.equal(ranked.value[A], result.value[A])
    torch.testing.assert_close(product(result.value), expected)
    heads = sum(w * u[HEAD] for w, u in zip(result.weights.tolist(), updates, strict=True))
    torch.testing.assert_close(result.value[HEAD], heads)
    rows = torch.stack(
        [torch.cat([(s * product(u)).flatten(), u[HEAD].flatten()]) for s, u in zip(scaling, updates, strict=True)]
    )
    torch.testing.assert_close(result.weights, aggregate(rows).weights, atol=1e-9, rtol=0)


def test_differences_to_a_global_adapter_become_a_whole_adapter() -> None:
    reference = adapter(99)
    updates = [{name: 0.1 * tensor for name, tensor in adapter(seed).items()} for seed in range(4)]
    result = aggregate(updates, space="product", reference=reference, scaling=2.0, combine="stacked")
    wholes = [{name: reference[name] + update[name] for name in update} for update in updates]
    moved = sum(w * (product(u) - product(reference)) for w, u in zip(result.weights.tolist(), wholes, strict=True))
    torch.testing.assert_close(product(result.value), 2.0 * (product(reference) + moved))
    heads = reference[HEAD] + sum(w * u[HEAD] for w, u in zip(result.weights.tolist(), updates, strict=True))
    torch.testing.assert_close(result.value[HEAD], heads)


def test_whole_adapters_and_differences_to_their_reference_weigh_the_same() -> None:
    reference = adapter(99)
    updates = [{name: 0.1 * tensor for name, tensor in adapter(seed).items()} for seed in range(5)]
    wholes = [{name: reference[name] + update[name] for name in update} for update in updates]
    differences = aggregate(updates, space="product", reference=reference, scaling=2.0)
    whole = aggregate(wholes, space="product", reference=reference, scaling=2.0, whole=True)
    torch.testing.assert_close(whole.weights, differences.weights, atol=1e-9, rtol=0)
    stacked = aggregate(wholes, space="product", reference=reference, scaling=2.0, whole=True, combine="stacked")
    exact = aggregate(updates, space="product", reference=reference, scaling=2.0, combine="stacked")
    torch.testing.assert_close(product(stacked.value), product(exact.value))
    torch.testing.assert_close(stacked.value[HEAD], exact.value[HEAD])


@pytest.mark.parametrize("rank", [1, 3, 7, 20])
def test_recompression_is_the_best_of_its_rank_and_reports_what_it_lost(rank: int) -> None:
    updates = [adapter(seed) for seed in range(4)]
    exact = product(aggregate(updates, space="product", combine="stacked").value)
    result = aggregate(updates, space="product", combine="recompressed", rank=rank)
    assert result.value[A].shape == (rank, 11)
    assert result.value[B].shape == (7, rank)
    u, singular, v = torch.linalg.svd(exact, full_matrices=False)
    best = u[:, :rank] * singular[:rank] @ v[:rank]
    torch.testing.assert_close(product(result.value), best)
    lost = float((exact - best).square().sum() / exact.square().sum())
    assert result.discarded == pytest.approx(lost, abs=1e-12)


def test_recompression_keeps_the_rank_of_the_updates_by_default() -> None:
    updates = [adapter(seed, rank) for seed, rank in enumerate((2, 4, 3))]
    result = aggregate(updates, space="product", combine="recompressed")
    assert result.value[A].shape == (4, 11)


def test_the_product_of_summed_factors_is_not_the_sum_of_products() -> None:
    updates = [adapter(seed) for seed in range(4)]
    exact = aggregate(updates, space="product", rule=mean, combine="stacked")
    factors = aggregate(updates, space="product", rule=mean)
    assert exact.weights.tolist() == factors.weights.tolist()
    error = torch.linalg.matrix_norm(product(factors.value) - product(exact.value))
    assert float(error / torch.linalg.matrix_norm(product(exact.value))) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "factors", "combine": "stacked"}, "space='product'"),
        ({"combine": "sum"}, "combine must be one of"),
        ({"combine": "recompressed", "rank": 0}, "rank must be a positive"),
        ({"combine": "recompressed", "rank": 2.5}, "rank must be a positive"),
        ({"combine": "stacked", "reference": adapter(0)}, "whole=True"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    updates = [adapter(seed, rank) for seed, rank in enumerate((2, 4, 3))]
    with pytest.raises(UpdateError, match=message):
        aggregate(updates, **{"space": "product", **options})


def test_a_client_whose_own_factors_do_not_fit_is_named() -> None:
    updates = [adapter(seed) for seed in range(3)]
    updates[1][B] = torch.ones(7, 2, dtype=torch.float64)
    with pytest.raises(UpdateError, match="client 1"):
        aggregate(updates, space="product", combine="stacked")


def shortened(gram: Tensor, prior_weights: Tensor, *, total: float) -> ClientWeights:
    """The mean, shortened towards the reference."""
    return ClientWeights(total * prior_weights)


@pytest.mark.parametrize("total", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("combine", ["factors", "stacked", "recompressed"])
def test_of_whole_adapters_the_reference_takes_what_the_weights_lack_to_one(total: float, combine: Any) -> None:
    """As differences to the reference would have it: nobody believed leaves the global adapter as it was."""
    reference = adapter(99)
    wholes = [{name: reference[name] + 0.1 * tensor for name, tensor in adapter(seed).items()} for seed in range(4)]
    rule = functools.partial(shortened, total=total)
    options: Any = {"space": "product", "rule": rule, "reference": reference, "scaling": 2.0}
    result = aggregate(wholes, whole=True, combine=combine, **options).value
    if total == 0:
        torch.testing.assert_close(product(result), (1.0 if combine == "factors" else 2.0) * product(reference))
    torch.testing.assert_close(result[HEAD], total * sum(w[HEAD] for w in wholes) / 4 + (1 - total) * reference[HEAD])
    if combine == "factors":
        differences = [{name: whole[name] - reference[name] for name in whole} for whole in wholes]
        moved = aggregate(differences, **options).value
        for name in result:
            torch.testing.assert_close(result[name], reference[name] + moved[name])


def test_a_reference_of_another_scaling_keeps_its_product_among_summed_factors() -> None:
    reference, updates = adapter(99), [adapter(seed) for seed in range(3)]
    rule = functools.partial(shortened, total=0.0)
    result = aggregate(
        updates, space="product", rule=rule, reference=reference, scaling=2.0, reference_scaling=0.5, whole=True
    )
    torch.testing.assert_close(2.0 * product(result.value), 0.5 * product(reference))


def test_a_reference_of_another_rank_joins_no_summed_factors() -> None:
    updates = [adapter(seed) for seed in range(3)]
    options: Any = {"space": "product", "reference": adapter(99, rank=5), "whole": True}
    aggregate(updates, rule=mean, **options)
    with pytest.raises(UpdateError, match=r"weights sum to 0\.5, and the reference"):
        aggregate(updates, rule=functools.partial(shortened, total=0.5), **options)


def test_factors_of_different_scalings_are_not_summed() -> None:
    updates = [adapter(seed) for seed in range(3)]
    with pytest.raises(UpdateError, match=r"scalings 1.0, 4.0.*combine='stacked'"):
        aggregate(updates, space="product", scaling=[1.0, 4.0, 1.0])
    alike = aggregate(updates, space="product", scaling=[2.0, 2.0, 2.0]).value
    torch.testing.assert_close(alike, aggregate(updates, space="product", scaling=2.0).value)
    left_out = aggregate(updates, space="product", scaling=[2.0, 4.0, 2.0], prior_weights=[1, 0, 1])
    assert left_out.weights[1] == 0


def test_a_reference_beside_clients_of_different_scalings_must_tell_its_own() -> None:
    updates = [adapter(seed) for seed in range(4)]
    options: Any = {"space": "product", "reference": adapter(99), "whole": True, "combine": "stacked"}
    scaling = [4.0, 1.0, 1.0, 2.0]
    with pytest.raises(UpdateError, match=r"scalings 1.0, 2.0, 4.0: pass .* reference_scaling"):
        aggregate(updates, scaling=scaling, **options)
    found = aggregate(updates, scaling=scaling, reference_scaling=1.0, **options)
    turned = aggregate(updates[::-1], scaling=scaling[::-1], reference_scaling=1.0, **options)
    torch.testing.assert_close(turned.weights.flip(0), found.weights)
    torch.testing.assert_close(product(turned.value), product(found.value))
    with pytest.raises(UpdateError, match="reference's scaling must be finite"):
        aggregate(updates, scaling=scaling, reference_scaling=float("nan"), **options)


def test_a_stacked_adapter_has_one_rank_though_layers_stack_different_clients() -> None:
    """In layer 0 most clients agree and one is the answer; in layer 1 all of them count."""
    names = [f"layers.{layer}.q.lora_{side}.weight" for layer in (0, 1) for side in "AB"]
    updates = []
    for seed in range(5):
        first, second = adapter(seed // 4), adapter(seed)
        updates.append(dict(zip(names, (first[A], first[B], second[A], second[B]), strict=True)))
    result = aggregate(updates, space="product", combine="stacked", grouping="layer")
    assert {result.value[name].shape[axis] for name, axis in zip(names, (0, 1, 0, 1), strict=True)} == {15}
    for a, b in (names[:2], names[2:]):
        weights = result.groups[a.split(".q")[0]].weights.tolist()
        expected = sum(w * update[b] @ update[a] for w, update in zip(weights, updates, strict=True))
        torch.testing.assert_close(result.value[b] @ result.value[a], expected)
