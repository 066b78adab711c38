"""What a client measures: nothing is read from an accelerator before the end."""

from __future__ import annotations

import pytest
import torch

from fedeat.data import Batch
from fedeat.perturbation import Norm
from fedeat.tally import Tally

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
NONE = torch.zeros(0, dtype=torch.long)
BATCH = Batch(MASK, MASK, MASK.bool(), NONE, NONE, NONE)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("norm", ["l2", "l2-sequence", "linf"])
def test_step_is_counted_without_a_look_at_any_number(norm: Norm, share: float) -> None:
    nowhere = torch.device("meta")  # where numbers cannot be read
    Tally(share).add(BATCH.to(nowhere), torch.ones((), device=nowhere), torch.ones(2, 4, 3, device=nowhere), norm=norm)


def test_metrics_are_means_over_steps_and_over_what_was_perturbed() -> None:
    tally = Tally(0.5)
    delta = torch.zeros(2, 4, 1)
    delta[0, :3] = 2.0
    tally.add(BATCH, torch.tensor(1.0), delta, norm="l2")
    tally.add(BATCH, torch.tensor(2.0), None, norm="l2")
    expected = {"loss": 1.5, "steps": 2.0, "perturbation": 0.5, "padding": 3 / 8, "update_norm": 5.0}
    assert tally.metrics({"a": torch.tensor([3.0, 4.0])}, unit=4.0) == expected
