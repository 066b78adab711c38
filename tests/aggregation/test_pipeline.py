"""The public call: kinds of input, spaces, options, and what it does with hostile updates."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat import aggregation
from fedeat.aggregation import (
    ClientWeights,
    aggregate,
    coordinate_median,
    geometric_median,
    krum,
    mean,
    multi_krum,
    trimmed_mean,
)
from fedeat.errors import UpdateError

RULES: list[Any] = [
    mean,
    geometric_median,
    krum,
    multi_krum,
    functools.partial(multi_krum, byzantine=1, selected=3),
    coordinate_median,
    trimmed_mean,
    functools.partial(trimmed_mean, byzantine=2),
    aggregation.mean_around_median,
]


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def as_dicts(updates: Tensor) -> list[dict[str, Tensor]]:
    return [{"a": row[:6].reshape(2, 3), "b": row[6:]} for row in updates]


def flat(value: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in value.values()])


@pytest.mark.parametrize("rule", RULES)
def test_matrix_rows_and_dicts_give_the_same_answer(rule: Any) -> None:
    updates = draw(8, 20)
    matrix = aggregate(updates, rule=rule)
    dicts = aggregate(as_dicts(updates), rule=rule)
    rows = aggregate(list(updates), rule=rule)
    assert matrix.value.shape == (20,)
    torch.testing.assert_close(flat(dicts.value), matrix.value)
    torch.testing.assert_close(rows.value, matrix.value)
    torch.testing.assert_close(dicts.weights, matrix.weights)
    assert matrix.weights.dtype == torch.float64
    assert float(matrix.weights.sum()) == pytest.approx(1)
    assert isinstance(matrix.iterations, int)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_value_has_the_dtype_of_the_updates(rule: Any, dtype: torch.dtype) -> None:
    updates = draw(8, 20)
    result = aggregate(updates.to(dtype), rule=rule)
    assert result.value.dtype == dtype
    torch.testing.assert_close(result.value.float(), aggregate(updates, rule=rule).value, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_one_client_returns_itself(rule: Any) -> None:
    update = draw(1, 5)
    if isinstance(rule, functools.partial):
        rule = rule.func
    assert torch.equal(aggregate(update, rule=rule).value, update[0])


@pytest.mark.parametrize("rule", RULES)
def test_zero_weight_leaves_a_client_out(rule: Any) -> None:
    updates = draw(8, 20)
    expected = aggregate(updates[1:], rule=rule)
    updates[0] = math.nan
    result = aggregate(updates, rule=rule, prior_weights=[0.0, *[2.0] * 7])
    torch.testing.assert_close(result.value, expected.value)
    torch.testing.assert_close(result.weights[1:], expected.weights)


def test_default_rule_is_the_geometric_median() -> None:
    updates = draw(5, 4)
    assert torch.equal(aggregate(updates).value, aggregate(updates, rule=geometric_median).value)


def test_mean_is_the_mean_and_follows_prior_weights() -> None:
    updates = draw(5, 4)
    torch.testing.assert_close(aggregate(updates, rule=mean).value, updates.mean(0))
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    torch.testing.assert_close(aggregate(updates, rule=mean, prior_weights=prior).value, prior @ updates / 15)
    assert math.isnan(aggregate(updates, rule=mean).gap)


def test_a_function_of_the_users_own_is_a_rule_on_inner_products_of_the_updates() -> None:
    updates = draw(4, 9) + 100

    def longest(gram: Tensor, prior_weights: Tensor) -> ClientWeights:
        torch.testing.assert_close(gram, updates.double() @ updates.double().T)
        return ClientWeights(torch.nn.functional.one_hot(gram.diagonal().argmax(), len(gram)).double())

    assert torch.equal(aggregate(updates, rule=longest).value, updates[updates.norm(dim=1).argmax()])


def test_same_input_gives_the_same_bits() -> None:
    updates = draw(10, 1000)
    assert torch.equal(aggregate(updates).value, aggregate(updates.clone()).value)


def test_gradients_do_not_follow_the_value() -> None:
    updates = draw(4, 5).requires_grad_()
    assert not aggregate(updates).value.requires_grad
    assert not aggregate(list(updates)).value.requires_grad


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_named_under_every_rule(rule: Any, bad: float) -> None:
    updates = draw(8, 20)
    updates[5, 7] = bad
    with pytest.raises(UpdateError, match="client 5"):
        aggregate(updates, rule=rule)
    with pytest.raises(UpdateError, match=r"client 5: tensor 'b'"):
        aggregate(as_dicts(updates), rule=rule)


def spoil(kind: str) -> list[Any]:
    updates: list[Any] = as_dicts(draw(5, 10))
    if kind == "shape":
        updates[0]["a"] = torch.zeros(3, 2)
    elif kind == "missing":
        del updates[0]["b"]
    elif kind == "extra":
        updates[0]["z"] = torch.zeros(1)
    elif kind == "dtype":
        updates[0]["a"] = updates[0]["a"].double()
    elif kind == "integer":
        updates[0]["a"] = torch.zeros(2, 3, dtype=torch.int64)
    elif kind == "device":
        updates[0]["a"] = updates[0]["a"].to("meta")
    elif kind == "not a tensor":
        updates[0]["a"] = [1.0, 2.0]
    elif kind == "empty":
        updates[0] = {}
    elif kind == "other kind":
        updates[0] = torch.zeros(10)
    elif kind == "none":
        updates[0] = None
    return updates


@pytest.mark.parametrize(
    "kind", ["shape", "missing", "extra", "dtype", "integer", "device", "not a tensor", "empty", "other kind", "none"]
)
def test_a_malformed_update_is_blamed_on_its_client_even_if_it_is_the_first(kind: str) -> None:
    with pytest.raises(UpdateError, match="client 0"):
        aggregate(spoil(kind))


@pytest.mark.parametrize(
    "updates",
    [
        [],
        torch.zeros(0, 3),
        torch.zeros(3, 0),
        torch.zeros(3),
        torch.zeros(2, 3, 4),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3, device="meta"),
        torch.eye(3).to_sparse(),
        [{}, {}],
        [{"a": torch.zeros(0)}],
        {"a": torch.zeros(3)},
        "updates.safetensors",
        [1.0, 2.0],
        None,
    ],
)
def test_what_is_no_set_of_updates_is_refused(updates: Any) -> None:
    with pytest.raises(UpdateError):
        aggregate(updates)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([1.0, -1.0, 1.0], "client 1 has -1.0"),
        ([1.0, 1.0, math.nan], "client 2 has nan"),
        ([math.inf, 1.0, 1.0], "client 0 has inf"),
        ([0.0, 0.0, 0.0], "all zero"),
        ([1.0, 1.0], "shape"),
        (["a", "b", "c"], "numbers"),
    ],
)
def test_bad_prior_weights_are_refused(prior: Any, message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        aggregate(draw(3, 4), prior_weights=prior)


def test_extreme_prior_weights_are_only_ratios() -> None:
    updates = draw(3, 4)
    for factor in (1e-300, 1e300):
        result = aggregate(updates, prior_weights=torch.full((3,), factor, dtype=torch.float64))
        torch.testing.assert_close(result.value, aggregate(updates).value)


def test_unknown_space_and_product_space_of_coordinates_are_refused() -> None:
    with pytest.raises(UpdateError, match="space"):
        aggregate(draw(2, 4), space="weights")  # type: ignore[call-overload]
    with pytest.raises(UpdateError, match="product space"):
        aggregate(draw(2, 4), space="product", rule=coordinate_median)


LAYERS = ("model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_B.weight", "model.layers.11.q.lora_A.weight")


def test_grouping_by_layer_weighs_each_layer_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [{name: torch.randn(4, 4, generator=generator) for name in (*LAYERS, "score.weight")} for _ in range(7)]
    updates[3][LAYERS[2]] *= 1e6
    result = aggregate(updates, grouping="layer")
    assert list(result.groups) == ["model.layers.0", "model.layers.11", "score.weight"]
    first = aggregate([{name: update[name] for name in LAYERS[:2]} for update in updates])
    torch.testing.assert_close(result.groups["model.layers.0"].weights, first.weights)
    torch.testing.assert_close(result.value[LAYERS[0]], first.value[LAYERS[0]])
    assert float(result.groups["model.layers.11"].weights[3]) < 1e-5 < float(result.weights[3])
    assert float(result.weights.sum()) == pytest.approx(1)
    assert result.converged
    assert list(aggregate(updates).groups) == [""]


def test_a_tensor_without_a_name_is_a_group_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [{name: torch.randn(3, generator=generator) for name in ("", "b")} for _ in range(5)]
    result = aggregate(updates, grouping="layer")
    for name, group in result.groups.items():
        torch.testing.assert_close(group.weights, aggregate([update[name] for update in updates]).weights)


def test_grouping_by_layer_keeps_lora_pairs_together_in_product_space() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("a.0.q.lora_A.weight", "a.0.q.lora_B.weight", "emb.lora_A.weight", "emb.lora_B.weight")
    updates = [{name: torch.randn(4, 4, generator=generator) for name in names} for _ in range(5)]
    assert list(aggregate(updates, grouping="layer", space="product").groups) == ["a.0", "emb"]


@pytest.mark.parametrize("rule", [krum, multi_krum, trimmed_mean, aggregation.mean_around_median])
@pytest.mark.parametrize("byzantine", [-1, 4, 1.5, True])
def test_more_attackers_than_a_rule_can_withstand_are_refused(rule: Any, byzantine: Any) -> None:
    with pytest.raises(UpdateError, match="byzantine must be an integer from 0 to"):
        aggregate(draw(7, 4), rule=functools.partial(rule, byzantine=byzantine))


@pytest.mark.parametrize("reference", [0, 2, 3])
@pytest.mark.parametrize("weightless", [[], [0], [1], [0, 1], [3], [1, 3]])
def test_the_trusted_update_is_the_same_one_whoever_has_no_weight(reference: int, weightless: list[int]) -> None:
    updates = draw(5, 20) + 1
    updates[1] *= -5
    prior = torch.ones(5)
    prior[weightless] = 0.0
    rule = functools.partial(aggregation.trusted_reference, reference=reference)
    result = aggregate(updates, rule=rule, prior_weights=prior)
    expected = rule(updates.double() @ updates.double().T, prior.double()).weights
    torch.testing.assert_close(result.weights, expected)
    torch.testing.assert_close(result.value, (expected @ updates.double()).float())


def test_a_trusted_update_that_is_no_client_is_refused_by_its_number_among_all() -> None:
    rule = functools.partial(aggregation.trusted_reference, reference=4)
    with pytest.raises(UpdateError, match="reference must be an integer from 0 to 3 with 4"):
        aggregate(draw(4, 5), rule=rule, prior_weights=[0, 1, 1, 1])


def test_a_trusted_update_behind_steps_takes_no_client_of_weight_zero() -> None:
    trusted = functools.partial(aggregation.trusted_reference, reference=0)
    rule = aggregation.chain(aggregation.norm_clipping, rule=trusted)
    assert aggregate(draw(4, 5), rule=rule).weights[0] == 0
    for behind in (rule, aggregation.chain(rule=rule), aggregation.chain(aggregation.norm_clipping, rule=rule)):
        with pytest.raises(UpdateError, match="leave them out of the updates"):
            aggregate(draw(4, 5), rule=behind, prior_weights=[0, 1, 1, 1])


def test_a_rule_that_is_no_function_or_returns_no_weights_is_refused_in_words() -> None:
    with pytest.raises(UpdateError, match="got 'krum': pass the function"):
        aggregate(draw(5, 4), rule="krum")  # type: ignore[call-overload]
    with pytest.raises(UpdateError, match="must return ClientWeights, got Mixing"):
        aggregate(draw(5, 4), rule=aggregation.norm_clipping)  # type: ignore[arg-type]
    behind = aggregation.chain(aggregation.norm_clipping, rule=aggregation.norm_clipping)  # type: ignore[arg-type]
    with pytest.raises(UpdateError, match="must return ClientWeights, got Mixing"):
        aggregate(draw(5, 4), rule=behind)


def test_of_a_client_of_weight_zero_the_layout_is_looked_at_and_nothing_else() -> None:
    updates = as_dicts(draw(3, 10))
    updates[2]["b"] = updates[2]["b"] * math.nan
    assert bool(torch.isfinite(flat(aggregate(updates, prior_weights=[1, 1, 0]).value)).all())
    updates[2]["b"] = torch.zeros(5)
    with pytest.raises(UpdateError, match="client 2"):
        aggregate(updates, prior_weights=[1, 1, 0])
