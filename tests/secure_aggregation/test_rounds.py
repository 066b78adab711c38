"""Rounds over secure sums: what becomes of them where a client leaves or lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedeat.algorithm import Round
from fedeat.errors import QuorumError
from fedeat.secure_aggregation import Answer, Request, SecureRounds, Sessions
from fedeat.secure_aggregation.messages import Keys, Mask, Sketched
from fedeat.updates import Adapter, ClientUpdate

ADAPTER = {"w": torch.zeros(64)}
WIDTH = 256
Answers = Callable[[int, Request, Any], Any]


def played(updates: Mapping[int, torch.Tensor], answers: Answers, *, sketch_width: int = 0) -> Round:
    """A round of these clients, whose every answer passes through a function on its way to the server."""
    held = Sessions(norm_bound=100.0, sketch_width=sketch_width)

    def train(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        return [held.keep(ClientUpdate(client, {"w": updates[client]}, 5), index) for client in cohort]

    def ask(index: int, requests: Mapping[int, Request]) -> dict[int, Answer | str]:
        given = held.ask(index, requests)
        return {client: answers(client, requests[client], answer) for client, answer in given.items()}

    rounds = SecureRounds(
        train=train,
        ask=ask,
        quorum=3,
        norm_bound=100.0,
        tolerance=1e-4,
        max_sums=8,
        sketch_width=sketch_width,
        mean=False,
        seed=0,
    )
    return rounds(ADAPTER, sorted(updates), 0)


@pytest.fixture
def updates() -> dict[int, torch.Tensor]:
    """Five, of which the first two are the same: the median is there, and all its weight with one of them."""
    generator = torch.Generator().manual_seed(0)
    found = {client: torch.randn(64, generator=generator) for client in range(5)}
    return {**found, 0: torch.zeros(64), 1: torch.zeros(64)}


def as_sent(client: int, request: Request, answer: Any) -> Any:
    """Nobody leaves or lies."""
    return answer


def test_a_client_that_leaves_after_its_sketch_had_the_weight_ends_the_round_by_name(
    updates: dict[int, torch.Tensor],
) -> None:
    whole = played(updates, as_sent, sketch_width=WIDTH)
    heavy = max(whole.weights, key=lambda client: whole.weights[client])
    assert whole.weights[heavy] > 0.5

    def without(gone: int) -> Answers:
        return lambda client, request, answer: "is gone" if client == gone and isinstance(request, Mask) else answer

    with pytest.raises(QuorumError, match=rf"0\.000 of the weight.*at least 0\.5(?s:.*)client {heavy}: is gone"):
        played(updates, without(heavy), sketch_width=WIDTH)
    light = min(whole.weights, key=lambda client: whole.weights[client])
    left = played(updates, without(light), sketch_width=WIDTH)
    assert torch.allclose(left.adapter["w"], whole.adapter["w"], atol=1e-5)


def test_a_sketch_that_no_update_has_leaves_its_client_out(updates: dict[int, torch.Tensor]) -> None:
    def lie(client: int, request: Request, answer: Any) -> Any:
        return (
            Sketched(torch.full((WIDTH,), 1e200, dtype=torch.float64))
            if client == 4 and isinstance(answer, Sketched)
            else answer
        )

    found = played(updates, lie, sketch_width=WIDTH)
    assert [item.client_id for item in found.rejected] == [4]
    assert "longer than 800, which no update within norm_bound has" in found.rejected[0].reason


@pytest.mark.parametrize("width", [4, WIDTH])
def test_no_honest_sketch_is_too_long(width: int) -> None:
    # All coordinates of one size: of all updates these come closest to the bound.
    same = {client: torch.full((64,), 100 / math.sqrt(64)) for client in range(3)}
    assert not played(same, as_sent, sketch_width=width).rejected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda keys: replace(keys, masks=keys.masks[:1] * len(keys.masks)), "one public key several times"),
        (lambda keys: replace(keys, masks=(keys.envelope, *keys.masks[1:])), "one public key several times"),
        (lambda keys: replace(keys, envelope=bytes(32)), "agrees on no secret"),
        (lambda keys: replace(keys, masks=(*keys.masks[:-1], bytes([1]) + bytes(31))), "agrees on no secret"),
        (lambda keys: replace(keys, envelope=keys.envelope[:31]), "agrees on no secret"),
        (lambda keys: replace(keys, masks=keys.masks[:1]), "another number of sums"),
    ],
    ids=["repeated", "envelope as mask", "zero", "low order", "short", "few"],
)
def test_keys_that_no_roster_can_hold_leave_their_client_out_by_name(
    change: Callable[[Keys], Keys], reason: str, updates: dict[int, torch.Tensor]
) -> None:
    def lie(client: int, request: Request, answer: Any) -> Any:
        return change(answer) if client == 4 and isinstance(answer, Keys) else answer

    found = played(updates, lie)
    assert [item.client_id for item in found.rejected] == [4]
    assert reason in found.rejected[0].reason


def test_clients_that_send_the_same_key_are_both_left_out(updates: dict[int, torch.Tensor]) -> None:
    shared = bytes([9]) + bytes(31)

    def lie(client: int, request: Request, answer: Any) -> Any:
        return replace(answer, envelope=shared) if client > 2 and isinstance(answer, Keys) else answer

    found = played(updates, lie)
    assert {item.client_id: item.reason for item in found.rejected} == dict.fromkeys(
        (3, 4), "sent a public key that another client sent too"
    )
