"""What the records say of a round."""

from __future__ import annotations

import torch

from fedeat.algorithm import Round
from fedeat.experiment.round_records import round_lines
from fedeat.updates import ClientUpdate


def test_the_loss_of_a_round_counts_its_accepted_clients_alike() -> None:
    updates = tuple(ClientUpdate(i, {"w": torch.ones(4)}, 10**i, {"loss": loss}) for i, loss in enumerate((1.0, 4.0)))
    result = Round(0, {}, (0, 1, 2), updates, (), {0: 0.9, 1: 0.1}, 3, 1e-9, 1.0)
    assert round_lines(result, malicious={1})[0]["loss"] == 2.5


def test_a_client_that_reports_no_loss_leaves_a_record() -> None:
    update = ClientUpdate(2, {"w": torch.ones(4)}, 5)
    result = Round(0, {}, (2,), (update,), (), {2: 1.0}, 0, float("nan"), 2.0)
    summary, client = round_lines(result, malicious={2})
    assert summary["loss"] != summary["loss"]  # NaN, null in the file
    assert (client["malicious"], client["update_norm"]) == (True, 2.0)
    assert "distance" not in client  # of what no server sees


def test_how_far_each_update_lies_from_the_aggregate_is_on_record() -> None:
    updates = tuple(ClientUpdate(i, {"w": torch.full((4,), float(i))}, 5) for i in (1, 2))
    result = Round(0, {}, (1, 2), updates, (), {1: 0.5, 2: 0.5}, 0, 0.0, 3.0, {1: 1.0, 2: 0.5})
    assert [line["distance"] for line in round_lines(result, malicious=())[1:]] == [1.0, 0.5]
