"""Pre-aggregation on the Gram matrix against the same maps applied to the updates."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from fedeat.aggregation import aggregate
from fedeat.aggregation.preaggregation import (
    Step,
    adaptive_clipping,
    bucketing,
    chain,
    nearest_neighbour_mixing,
    norm_clipping,
)
from fedeat.aggregation.rules import centred_clipping, krum, mean
from fedeat.aggregation.weiszfeld import geometric_median
from fedeat.errors import UpdateError


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def fresh() -> torch.Generator:
    return torch.Generator().manual_seed(5)


STEPS: list[Step] = [
    nearest_neighbour_mixing,
    functools.partial(nearest_neighbour_mixing, byzantine=2),
    norm_clipping,
    functools.partial(norm_clipping, radius=0.5),
    adaptive_clipping,
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("rule", [mean, geometric_median, krum, centred_clipping])
def test_a_chain_equals_the_rule_on_the_mapped_updates(step: Step, rule: object) -> None:
    updates = draw(9, 6)
    mapped = step(updates @ updates.T, prior(9)).matrix @ updates
    chained = aggregate(updates, rule=chain(step, rule=rule))  # type: ignore[arg-type]
    torch.testing.assert_close(chained.value, aggregate(mapped, rule=rule).value)  # type: ignore[call-overload]


def test_steps_apply_in_order() -> None:
    updates = draw(9, 6)
    steps: list[Step] = [adaptive_clipping, nearest_neighbour_mixing]
    mapped = updates
    for step in steps:
        mapped = step(mapped @ mapped.T, prior(9)).matrix @ mapped
    torch.testing.assert_close(aggregate(updates, rule=chain(*steps, rule=mean)).value, mapped.mean(0))


def test_neighbour_mixing_averages_the_nearest() -> None:
    updates = draw(7, 4)
    matrix = nearest_neighbour_mixing(updates @ updates.T, prior(7), byzantine=3).matrix
    distances = torch.cdist(updates, updates)
    for row, near in zip(matrix, distances.argsort(dim=1)[:, :4], strict=True):
        assert set(torch.nonzero(row).flatten().tolist()) == set(near.tolist())
    torch.testing.assert_close(matrix.sum(1), torch.ones(7, dtype=torch.float64))


def test_buckets_hold_every_client_once_and_follow_the_generator() -> None:
    gram = torch.eye(7).double()
    mixing = bucketing(gram, prior(7), generator=fresh(), size=3)
    assert mixing.matrix.shape == (3, 7)
    assert (mixing.matrix > 0).sum(0).tolist() == [1] * 7
    assert (mixing.matrix > 0).sum(1).tolist() == [3, 3, 1]
    torch.testing.assert_close(mixing.prior_weights, torch.tensor([3, 3, 1]).double() / 7)
    assert torch.equal(bucketing(gram, prior(7), generator=fresh(), size=3).matrix, mixing.matrix)
    generator = fresh()
    bucketing(gram, prior(7), generator=generator, size=3)
    assert not torch.equal(bucketing(gram, prior(7), generator=generator, size=3).matrix, mixing.matrix)


def test_bucketing_and_mean_is_the_mean() -> None:
    updates = draw(7, 4)
    rule = chain(functools.partial(bucketing, generator=fresh(), size=3), rule=mean)
    torch.testing.assert_close(aggregate(updates, rule=rule).value, updates.mean(0))


def test_clipping_bounds_norms_and_keeps_directions() -> None:
    updates = draw(9, 4)
    updates[0] *= 1e6
    norms = torch.linalg.vector_norm(updates, dim=1)
    clipped = norm_clipping(updates @ updates.T, prior(9)).matrix @ updates
    torch.testing.assert_close(torch.linalg.vector_norm(clipped, dim=1), norms.clamp(max=float(norms.median())))
    torch.testing.assert_close(torch.nn.functional.normalize(clipped), torch.nn.functional.normalize(updates))


def test_adaptive_clipping_shortens_the_longest_to_the_next() -> None:
    updates = draw(10, 4)
    norms = torch.linalg.vector_norm(updates, dim=1).sort(descending=True).values
    clipped = adaptive_clipping(updates @ updates.T, prior(10), byzantine=2).matrix @ updates
    # k = floor(2 * 2 * 8 / 10) = 3
    assert float(torch.linalg.vector_norm(clipped, dim=1).max()) == pytest.approx(float(norms[3]))


def test_zero_updates_pass_every_step() -> None:
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    for step in STEPS[2:]:
        assert aggregate(zeros, rule=chain(step, rule=mean)).value.tolist() == [0.0, 0.0, 0.0]


def test_options_out_of_range_are_refused() -> None:
    gram = torch.eye(5).double()
    with pytest.raises(UpdateError, match="byzantine"):
        nearest_neighbour_mixing(gram, prior(5), byzantine=3)
    with pytest.raises(UpdateError, match="size"):
        bucketing(gram, prior(5), generator=fresh(), size=0)
    with pytest.raises(UpdateError, match="radius"):
        norm_clipping(gram, prior(5), radius=0)
