"""Byzantine clients wrap an engine: what they send, and that honest clients are left alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedeat.attacks.byzantine import choose_malicious, gaussian, model_replacement, not_a_number, sign_flip
from fedeat.updates import Adapter, ClientUpdate, validate

GLOBAL = {"a": torch.zeros(3, 4), "b": torch.zeros(5), "head": torch.zeros(2, 2)}
MALICIOUS = frozenset({1, 3})


def honest(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
    updates = []
    for client in cohort:
        generator = torch.Generator().manual_seed(100 * index + client)
        delta = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in adapter.items()}
        delta["b"] = torch.zeros(5)
        updates.append(ClientUpdate(client, delta, 10 + client, {"loss": 1.0}))
    return updates


ATTACKS = {
    "sign_flip": sign_flip(honest, malicious=MALICIOUS, scale=4.0),
    "gaussian": gaussian(honest, malicious=MALICIOUS, scale=3.0, seed=0),
    "not_a_number": not_a_number(honest, malicious=MALICIOUS),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_only_malicious_clients_change_and_keep_names_shapes_and_dtypes(name: str) -> None:
    sent, true = ATTACKS[name](GLOBAL, [0, 1, 2, 3], 2), honest(GLOBAL, [0, 1, 2, 3], 2)
    for got, expected in zip(sent, true, strict=True):
        assert (got.client_id, got.num_examples, got.metrics) == (
            expected.client_id,
            expected.num_examples,
            {"loss": 1},
        )
        assert {key: (t.shape, t.dtype) for key, t in got.delta.items()} == {
            key: (t.shape, t.dtype) for key, t in expected.delta.items()
        }
        same = all(torch.equal(got.delta[key], expected.delta[key]) for key in GLOBAL)
        assert same == (got.client_id not in MALICIOUS)


def test_sign_flip_is_exact() -> None:
    sent, true = ATTACKS["sign_flip"](GLOBAL, [1], 0), honest(GLOBAL, [1], 0)
    assert all(torch.equal(sent[0].delta[key], -4.0 * true[0].delta[key]) for key in GLOBAL)


def test_gaussian_noise_has_the_scaled_length_and_another_draw_each_round_and_client() -> None:
    draws = []
    for index, client in ((0, 1), (0, 3), (1, 1)):
        sent, true = ATTACKS["gaussian"](GLOBAL, [client], index)[0], honest(GLOBAL, [client], index)[0]
        for key, tensor in sent.delta.items():
            length = float(true.delta[key].norm()) or 1.0  # a tensor that did not move
            assert float(tensor.norm()) == pytest.approx(3.0 * length, rel=1e-5)
        draws.append(sent.delta["a"] / sent.delta["a"].norm())
    assert all(float((draws[i] * draws[j]).sum().abs()) < 0.9 for i in range(3) for j in range(i))
    again = ATTACKS["gaussian"](GLOBAL, [1], 1)[0].delta["a"]
    assert torch.equal(draws[2], again / again.norm())


def test_nan_is_rejected_by_the_servers_check() -> None:
    accepted, rejected = validate(ATTACKS["not_a_number"](GLOBAL, [0, 1, 2, 3], 0), GLOBAL, [0, 1, 2, 3])
    assert [update.client_id for update in accepted] == [0, 2]
    assert [(item.client_id, "NaN" in item.reason) for item in rejected] == [(1, True), (3, True)]


def test_finite_attacks_pass_the_servers_check() -> None:
    for name in ("sign_flip", "gaussian"):
        assert len(validate(ATTACKS[name](GLOBAL, [0, 1, 2, 3], 0), GLOBAL, [0, 1, 2, 3])[0]) == 4


@pytest.mark.parametrize(("cohort", "factor"), [([0, 1, 2, 3], 2.0), ([0, 1, 2, 4], 4.0)])
def test_replacement_makes_the_mean_the_attackers_own_update(cohort: list[int], factor: float) -> None:
    sent = {u.client_id: u for u in model_replacement(honest, malicious=MALICIOUS)(GLOBAL, cohort, 0)}
    true = {u.client_id: u for u in honest(GLOBAL, cohort, 0)}
    assert torch.equal(sent[0].delta["a"], true[0].delta["a"])
    assert torch.equal(sent[1].delta["a"], factor * true[1].delta["a"])
    fixed = model_replacement(honest, malicious=MALICIOUS, scale=3.0)(GLOBAL, cohort, 0)
    assert torch.equal(fixed[1].delta["a"], 3.0 * true[1].delta["a"])


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.45, 4), (0.49, 4)])
def test_malicious_clients_are_drawn_once_from_the_seed(fraction: float, count: int) -> None:
    chosen = choose_malicious(range(10), fraction, seed=1)
    assert len(chosen) == count
    assert chosen <= set(range(10))
    assert len(chosen) < 10 - len(chosen)
    assert chosen == choose_malicious(range(10), fraction, seed=1)


def test_seeds_draw_other_malicious_clients() -> None:
    assert len({choose_malicious(range(10), 0.3, seed=seed) for seed in range(8)}) > 1
