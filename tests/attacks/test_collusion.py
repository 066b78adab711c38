"""Colluding clients: what each attack sends, and that it does to a rule what its paper says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from fedeat import aggregation, geometric_median
from fedeat.aggregation import Aggregate
from fedeat.algorithm import RunClients
from fedeat.attacks.byzantine import sign_flip
from fedeat.attacks.collusion import adaptive, hidden_deviations, inner_product, little_is_enough, mimic, min_max
from fedeat.updates import Adapter, ClientUpdate, difference, norm

GLOBAL = {"a": torch.zeros(6, 4), "b": torch.zeros(8)}
MALICIOUS = frozenset({1, 4, 6})
COHORT = list(range(10))


def honest_run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
    """Updates that scatter round a common one: what honest clients with similar data send."""
    updates = []
    for client in cohort:
        generator = torch.Generator().manual_seed(100 * index + client)
        delta = {name: 1.0 + torch.randn(t.shape, generator=generator) for name, t in adapter.items()}
        updates.append(ClientUpdate(client, delta, 10 + client, {"loss": 1.0}))
    return updates


def median(updates: Sequence[ClientUpdate], adapter: Adapter) -> Aggregate[dict[str, torch.Tensor]]:
    return aggregation.aggregate([update.delta for update in updates], rule=geometric_median)


def mean(updates: Sequence[ClientUpdate], adapter: Adapter) -> Aggregate[dict[str, torch.Tensor]]:
    return aggregation.aggregate([update.delta for update in updates], rule=aggregation.mean)


ATTACKS: dict[str, RunClients] = {
    "ipm": inner_product(honest_run, malicious=MALICIOUS, scale=1.0),
    "alie": little_is_enough(honest_run, malicious=MALICIOUS),
    "mimic": mimic(honest_run, malicious=MALICIOUS),
    "min_max": min_max(honest_run, malicious=MALICIOUS),
    "adaptive": adaptive(honest_run, malicious=MALICIOUS, aggregate=median),
}


def vector(delta: Adapter) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in delta.values()]).double()


def honest_matrix(index: int = 0) -> torch.Tensor:
    clients = [client for client in COHORT if client not in MALICIOUS]
    return torch.stack([vector(update.delta) for update in honest_run(GLOBAL, clients, index)])


@pytest.mark.parametrize("name", ATTACKS)
def test_the_malicious_send_one_update_and_honest_clients_are_left_alone(name: str) -> None:
    sent, true = ATTACKS[name](GLOBAL, COHORT, 2), honest_run(GLOBAL, COHORT, 2)
    bad = [update for update in sent if update.client_id in MALICIOUS]
    assert len({tuple(vector(update.delta).tolist()) for update in bad}) == 1
    assert [(u.client_id, u.num_examples) for u in sent] == [(u.client_id, u.num_examples) for u in true]
    for got, expected in zip(sent, true, strict=True):
        assert {key: (t.shape, t.dtype) for key, t in got.delta.items()} == {
            key: (t.shape, t.dtype) for key, t in expected.delta.items()
        }
        if got.client_id not in MALICIOUS:
            assert got is not expected
            assert torch.equal(vector(got.delta), vector(expected.delta))
        else:
            assert not torch.equal(vector(got.delta), vector(expected.delta))
    assert torch.equal(vector(bad[0].delta), vector(ATTACKS[name](GLOBAL, COHORT, 2)[1].delta))


@pytest.mark.parametrize("name", ATTACKS)
def test_cohorts_without_honest_or_without_malicious_clients_are_served(name: str) -> None:
    assert [update.client_id for update in ATTACKS[name](GLOBAL, [1, 4], 0)] == [1, 4]
    plain = ATTACKS[name](GLOBAL, [0, 2], 0)
    assert all(
        torch.equal(vector(a.delta), vector(b.delta)) for a, b in zip(plain, honest_run(GLOBAL, [0, 2], 0), strict=True)
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_a_broken_honest_update_does_not_spoil_the_attack(name: str) -> None:
    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        updates = honest_run(adapter, cohort, index)
        broken = {"a": torch.full((6, 4), math.nan), "b": torch.zeros(8)}
        return [ClientUpdate(0, broken, 10), *updates[1:]]

    makers: dict[str, Callable[[RunClients], RunClients]] = {
        "ipm": lambda inner: inner_product(inner, malicious=MALICIOUS, scale=1.0),
        "alie": lambda inner: little_is_enough(inner, malicious=MALICIOUS),
        "mimic": lambda inner: mimic(inner, malicious=MALICIOUS),
        "min_max": lambda inner: min_max(inner, malicious=MALICIOUS),
        "adaptive": lambda inner: adaptive(inner, malicious=MALICIOUS, aggregate=median),
    }
    assert bool(torch.isfinite(vector(makers[name](run)(GLOBAL, COHORT, 0)[1].delta)).all())


def test_ipm_is_the_negative_mean_of_the_honest() -> None:
    assert torch.allclose(vector(ATTACKS["ipm"](GLOBAL, COHORT, 0)[1].delta), -honest_matrix().mean(0), atol=1e-6)


def test_ipm_turns_the_mean_round_only_above_the_ratio_of_honest_to_malicious() -> None:
    direction = honest_matrix().mean(0)
    for scale, turned in ((2.0, False), (2.7, True)):  # 7 honest, 3 malicious: 7/3
        sent = inner_product(honest_run, malicious=MALICIOUS, scale=scale)(GLOBAL, COHORT, 0)
        assert (float(vector(mean(sent, GLOBAL).value) @ direction) < 0) is turned


@pytest.mark.parametrize(
    ("updates", "malicious", "expected"),
    # s = floor(n/2 + 1) - m honest must lie farther out: z with P(X < z) = (n - m - s)/(n - m).
    [(50, 12, 0.3360), (10, 3, 0.1800), (10, 4, 0.4307), (11, 5, 0.9674), (3, 1, 0.0), (2, 1, 0.0), (1, 0, 0.0)],
)
def test_alie_hides_behind_enough_honest_clients(updates: int, malicious: int, expected: float) -> None:
    assert hidden_deviations(updates, malicious) == pytest.approx(expected, abs=1e-4)


def test_alie_shifts_each_coordinate_by_its_own_spread() -> None:
    sent = vector(little_is_enough(honest_run, malicious=MALICIOUS, z=1.5)(GLOBAL, COHORT, 0)[1].delta)
    true = honest_matrix()
    assert torch.allclose(sent, true.mean(0) - 1.5 * true.std(0, correction=0), atol=1e-5)


def test_mimic_copies_the_honest_client_farthest_along_the_main_direction() -> None:
    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        updates = honest_run(adapter, cohort, index)
        return [
            ClientUpdate(u.client_id, {k: t + 9 * (u.client_id == 5) for k, t in u.delta.items()}, 1) for u in updates
        ]

    sent = {update.client_id: update for update in mimic(run, malicious=MALICIOUS)(GLOBAL, COHORT, 0)}
    assert all(torch.equal(vector(sent[client].delta), vector(sent[5].delta)) for client in MALICIOUS)


def test_min_max_goes_exactly_as_far_as_the_two_farthest_honest_clients_lie_apart() -> None:
    sent, true = vector(ATTACKS["min_max"](GLOBAL, COHORT, 0)[1].delta), honest_matrix()
    assert float((true - sent).norm(dim=1).max()) == pytest.approx(float(torch.cdist(true, true).max()), rel=1e-5)
    assert float(sent @ true.mean(0)) < float(true.mean(0) @ true.mean(0))


def back(
    name: str, aggregate: Callable[[Sequence[ClientUpdate], Adapter], Aggregate[dict[str, torch.Tensor]]]
) -> float:
    """How far an attack moves an aggregate against the honest mean."""
    direction = honest_matrix().mean(0)
    result = vector(aggregate(ATTACKS[name](GLOBAL, COHORT, 0), GLOBAL).value)
    return float((honest_matrix().mean(0) - result) @ direction / direction.norm())


def test_knowing_the_median_does_it_more_harm_than_any_attack_that_does_not() -> None:
    others = [back(name, median) for name in ("ipm", "alie", "mimic", "min_max")]
    assert back("adaptive", median) > max(*others, 0.0)
    flipped = sign_flip(honest_run, malicious=MALICIOUS, scale=4.0)(GLOBAL, COHORT, 0)
    direction = honest_matrix().mean(0)
    far = float((direction - vector(median(flipped, GLOBAL).value)) @ direction / direction.norm())
    assert back("adaptive", median) > far


def test_against_the_mean_the_adaptive_attack_goes_as_far_as_it_may() -> None:
    sent = adaptive(honest_run, malicious=MALICIOUS, aggregate=mean)(GLOBAL, COHORT, 0)
    true = honest_run(GLOBAL, [c for c in COHORT if c not in MALICIOUS], 0)
    centre = {name: torch.stack([u.delta[name] for u in true]).mean(0) for name in GLOBAL}
    spread = max(norm(difference(u.delta, centre)) for u in true)
    assert norm(difference(sent[1].delta, centre)) == pytest.approx(64 * spread, rel=1e-4)


def test_adaptive_attackers_without_honest_clients_try_the_cohort_that_the_server_gets() -> None:
    tried: list[list[int]] = []

    def aggregate(updates: Sequence[ClientUpdate], adapter: Adapter) -> Aggregate[dict[str, torch.Tensor]]:
        tried.append([update.client_id for update in updates])
        return median(updates, adapter)

    adaptive(honest_run, malicious=MALICIOUS, aggregate=aggregate)(GLOBAL, [1, 4, 6], 0)
    assert tried
    assert all(cohort == [1, 4, 6] for cohort in tried)
