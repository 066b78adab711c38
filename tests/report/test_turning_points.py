"""The smallest minority that could have turned a median around, as records tell it."""

from __future__ import annotations

import pytest
import torch

from fedeat.aggregation import aggregate
from fedeat.report.reading import Run
from fedeat.report.turning_points import spreads, turning_number, weakest_round

MEDIAN = {"aggregation": {"rule": "geometric_median", "before": []}}


def run_of(*rounds: torch.Tensor, name: str = "gm", config: dict[str, object] | None = None) -> Run:
    """A run whose rounds had these updates (n, d)."""
    lines, clients = [], []
    for index, updates in enumerate(rounds):
        value = aggregate(updates).value
        accepted = list(range(len(updates)))
        lines.append({"round": index, "accepted": accepted, "update_norm": float(value.norm())})
        distances = (updates - value).norm(dim=1)
        clients += [
            {"round": index, "client": client, "distance": float(distances[client])} for client in range(len(updates))
        ]
    return Run(name=name, config=MEDIAN if config is None else config, rounds=tuple(lines), clients=tuple(clients))


def scattered(clients: int, spread: float) -> torch.Tensor:
    """Updates at right angles to their mean, which has length one, and `spread` from it."""
    away = torch.eye(clients, dtype=torch.float64) - 1 / clients
    away *= spread / away.norm(dim=1, keepdim=True)
    return torch.cat([torch.ones(clients, 1, dtype=torch.float64), away], 1)


@pytest.mark.parametrize(("spread", "needed"), [(0.0, 11), (1.0, 9), (3.0, 5)])
def test_the_number_that_turns_a_median_follows_from_how_far_updates_lie_apart(spread: float, needed: int) -> None:
    run = run_of(scattered(20, spread))
    assert spreads(run) == {0: pytest.approx(spread, abs=1e-9)}
    assert turning_number(spreads(run)[0], run.rounds[0]) == needed


def test_far_attackers_do_not_change_it_much() -> None:
    updates = scattered(20, 1.0)
    updates[:3] *= -1e6
    assert spreads(run_of(updates))[0] < 2.0


def test_the_weakest_round_of_all_runs_is_told() -> None:
    near, far = run_of(scattered(10, 0.5), scattered(10, 1.0), name="near"), run_of(scattered(10, 4.0), name="far")
    assert "in round 0 of far half of the updates lay 4.0 times" in weakest_round([near, far])
    assert "and 2 of 10 clients of one mind could turn it around." in weakest_round([near, far])
    assert "in round 1 half of the updates lay 1.0 times" in weakest_round([near])


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"rule": "mean"},
        {"rule": "geometric_median", "before": ["bucketing"]},
        {"rule": "geometric_median", "space": "product"},
        {"rule": "geometric_median", "grouping": "layer"},
    ],
)
def test_of_other_rules_and_distances_nothing_is_told(section: dict[str, object]) -> None:
    assert weakest_round([run_of(scattered(10, 4.0), config={"aggregation": section})]) == ""


def test_a_round_with_known_attackers_tells_nothing() -> None:
    run = run_of(scattered(10, 1.0), scattered(10, 4.0))
    attacked = Run("gm", MEDIAN, rounds=(run.rounds[0], {**run.rounds[1], "malicious": [3]}), clients=run.clients)
    assert "in round 0 half of the updates lay 1.0 times" in weakest_round([attacked])


def test_rounds_without_record_or_length_are_left_out() -> None:
    run = run_of(scattered(10, 2.0))
    assert spreads(Run("old", MEDIAN, rounds=run.rounds, clients=({"round": 0, "client": 1},))) == {}
    still = ({**run.rounds[0], "update_norm": 0.0},)
    assert weakest_round([Run("still", MEDIAN, rounds=still, clients=run.clients)]) == ""
