"""Updates: their arithmetic, and every reason to reject one, by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedeat.updates import ClientUpdate, Rejection, apply, difference, distance, norm, validate

REFERENCE = {"a": torch.ones(2, 3), "b": torch.zeros(4)}


def update(client: int = 0, examples: int = 5, **changes: torch.Tensor) -> ClientUpdate:
    return ClientUpdate(client, {"a": torch.full((2, 3), 0.5), "b": torch.ones(4), **changes}, examples)


def test_difference_and_apply_are_inverse_and_mutate_nothing() -> None:
    local = {"a": torch.full((2, 3), 3.0, requires_grad=True), "b": torch.arange(4.0)}
    delta = difference(local, REFERENCE)
    again = apply(REFERENCE, delta)
    assert all(torch.equal(again[name], local[name]) for name in local)
    assert not any(tensor.requires_grad for tensor in (*delta.values(), *again.values()))
    assert torch.equal(REFERENCE["a"], torch.ones(2, 3))


def test_apply_keeps_the_adapters_dtype() -> None:
    assert apply({"a": torch.zeros(2)}, {"a": torch.ones(2, dtype=torch.float64)})["a"].dtype == torch.float32


def test_norm_is_that_of_one_vector_in_float64() -> None:
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == 5.0
    assert norm({"a": torch.full((100,), 1e30)}) == pytest.approx(1e31)
    assert norm({}) == 0.0


def test_distance_is_the_norm_of_the_difference_in_float64() -> None:
    here, there = {"a": torch.tensor([1e4]), "b": torch.ones(2, 2)}, {"a": torch.tensor([1e4]), "b": torch.zeros(2, 2)}
    assert distance(here, there) == 2.0
    assert distance({"a": torch.full((100,), 1e30)}, {"a": torch.full((100,), -1e30)}) == pytest.approx(2e31)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (replace(update(), delta={"a": torch.ones(2, 3)}), "1 of 2 tensors are missing, first 'b'"),
        (update(c=torch.ones(1)), "1 unknown tensors, first 'c'"),
        (update(a=torch.ones(3, 2)), r"tensor 'a' has shape (3, 2), expected (2, 3)"),
        (update(a=torch.ones(2, 3).double()), "tensor 'a' has dtype torch.float64, expected torch.float32"),
        (update(b=torch.tensor([0.0, math.nan, 0.0, 0.0])), "tensor 'b' holds a NaN or an infinity"),
        (update(b=torch.tensor([0.0, -math.inf, 0.0, 0.0])), "tensor 'b' holds a NaN or an infinity"),
        (update(examples=0), "num_examples must be a positive integer, got 0"),
        (update(examples=2.5), "num_examples must be a positive integer, got 2.5"),  # type: ignore[arg-type]
        (update(examples=True), "num_examples must be a positive integer, got True"),
        (update(client=7), "was not asked in this round"),
    ],
)
def test_unfit_update_is_rejected_with_its_reason(bad: ClientUpdate, reason: str) -> None:
    good = update(client=1)
    accepted, rejected = validate([bad, good], REFERENCE, [0, 1])
    assert accepted == [good]
    assert Rejection(bad.client_id, reason) in rejected


def test_silent_client_and_second_answer_are_rejected() -> None:
    first, second = update(client=2), update(client=2, examples=9)
    accepted, rejected = validate([first, second], REFERENCE, [2, 3])
    assert accepted == [first]
    assert rejected == [
        Rejection(2, "answered twice in one round; the first answer counts"),
        Rejection(3, "did not answer"),
    ]


def test_accepted_are_sorted_by_client_whatever_the_order_of_arrival() -> None:
    accepted, rejected = validate([update(client=client) for client in (4, 0, 2)], REFERENCE, [0, 2, 4])
    assert [item.client_id for item in accepted] == [0, 2, 4]
    assert rejected == []
