"""The geometric median against independent oracles and its known properties."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedeat.aggregation import aggregate
from fedeat.aggregation.weiszfeld import geometric_median

KINDS = (
    "random",
    "outliers",
    "far",
    "shifted",
    "clusters",
    "duplicates",
    "line",
    "grid",
    "near-line",
    "heavy",
    "dense",
)


def objective(updates: Tensor, point: Tensor, prior: Tensor) -> Tensor:
    """Weighted sum of distances; (n, d) and (d,), or batched."""
    distances: Tensor = torch.linalg.vector_norm(updates - point.unsqueeze(-2), dim=-1)
    return distances @ prior


def naive_weiszfeld(updates: Tensor, prior: Tensor, steps: int) -> Tensor:
    """Weiszfeld's iteration from the coordinate median, float64, batched over (m, n, d)."""
    point = updates.median(dim=-2).values + 1e-9
    for _ in range(steps):
        distances = torch.linalg.vector_norm(updates - point.unsqueeze(-2), dim=-1).clamp_min(1e-200)
        pulls = prior / distances
        point = (pulls.unsqueeze(-1) * updates).sum(-2) / pulls.sum(-1, keepdim=True)
    return point


def draw(kind: str, count: int, width: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if kind == "outliers":
        rows[: (count - 1) // 2] *= 1e6
    elif kind == "far":
        rows[: (count - 1) // 2] *= 1e12
    elif kind == "shifted":
        rows += 1e6
    elif kind == "clusters":
        rows *= 1e-6
        rows[: count // 2, 0] += 1
    elif kind == "duplicates":
        rows[1 : count // 2 + 1] = rows[0]
    elif kind == "line":
        rows = rows[:, :1] * rows[:1] + rows[1:2]
    elif kind == "grid":
        rows = rows.round()
    elif kind == "near-line":
        rows = rows[:, :1] + 1e-8 * rows
    elif kind == "heavy":
        rows *= torch.exp(5 * torch.randn(count, 1, generator=generator, dtype=torch.float64))
    elif kind == "dense":
        rows[count // 3 :] = rows[0] + 1e-9 * rows[count // 3 :]
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_median_is_optimal_and_its_gap_a_bound_on_random_and_adversarial_instances(kind: str) -> None:
    """1,001 instances over all kinds, against naive Weiszfeld and the best data point."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    for count, width in [(3, 2), (4, 3), (5, 2), (6, 2), (7, 40), (10, 3), (20, 30)]:
        batch = torch.stack([draw(kind, count, width, generator) for _ in range(13)])
        prior = (
            torch.rand(count, generator=generator, dtype=torch.float64) if width == 3 else torch.ones(count).double()
        )
        prior = prior / prior.sum()
        reference = objective(batch, naive_weiszfeld(batch, prior, 400), prior)
        at_points = torch.stack([objective(batch, batch[:, i], prior) for i in range(count)]).min(0).values
        for updates, best in zip(batch, torch.minimum(reference, at_points).tolist(), strict=True):
            result = aggregate(updates, prior_weights=prior)
            excess = float(objective(updates, result.value, prior)) / best - 1
            assert excess <= 1e-12
            assert excess <= result.gap
            assert result.converged
            assert result.iterations <= 25
            assert float(result.weights.sum()) == pytest.approx(1, abs=1e-12)
            assert float(result.weights.min()) >= -1e-9


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("count", [4, 6, 20])
def test_two_tight_equal_clusters_take_few_steps(count: int, spread: float) -> None:
    """Nearly flat between the clusters: far from the reference, one cluster's updates can hardly be told apart."""
    prior = torch.full((count,), 1 / count, dtype=torch.float64)
    for seed in range(3):
        for second in (1.0, 1e-3):
            updates = spread * torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            updates[: count // 2] *= second
            updates[: count // 2, 0] += 1
            result = aggregate(updates)
            steps = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
            ends = updates[: count // 2].mean(0), updates[count // 2 :].mean(0)
            best = min(float(objective(updates, point, prior)) for point in steps * ends[0] + (1 - steps) * ends[1])
            assert float(objective(updates, result.value, prior)) <= best * (1 + 1e-12)
            assert result.iterations <= 25
            assert result.converged


def test_updates_too_close_to_tell_apart_widen_the_gap_instead_of_passing_for_one() -> None:
    """Inner products about a far reference cannot resolve 1e-9: the proof must not claim what they do not show."""
    updates = 1e-9 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    prior = torch.full((5,), 0.2, dtype=torch.float64)
    result = geometric_median(updates @ updates.T, prior)
    best = aggregate(updates).objective
    reached = float(objective(updates, result.weights @ updates, prior))
    assert result.objective == 0 or reached / best - 1 <= result.gap


def test_loose_tolerances_still_give_true_bounds() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        updates = draw("heavy", 9, 4, generator)
        prior = torch.full((9,), 1 / 9, dtype=torch.float64)
        best = geometric_median(updates @ updates.T, prior)
        for steps in (1, 2, 3):
            early = geometric_median(updates @ updates.T, prior, max_iterations=steps)
            excess = early.objective / best.objective - 1
            assert excess <= early.gap + 1e-12
            assert early.converged == (early.gap <= 1e-9)


def test_median_of_a_triangle_is_its_fermat_point() -> None:
    corners = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    point = aggregate(corners).value
    towards = torch.nn.functional.normalize(corners - point, dim=1)
    cosines = torch.stack([towards[0] @ towards[1], towards[1] @ towards[2], towards[2] @ towards[0]])
    torch.testing.assert_close(cosines, torch.full((3,), -0.5, dtype=torch.float64))


def test_median_of_a_blunt_triangle_is_its_corner_bit_for_bit() -> None:
    corners = torch.tensor([[0.1, 0.2], [10.0, 1.0], [-10.0, 1.0]])
    result = aggregate(corners)
    assert torch.equal(result.value, corners[0])
    assert result.weights.tolist() == [1.0, 0.0, 0.0]
    assert result.gap < 1e-14


def test_median_of_crossing_diagonals_is_their_crossing() -> None:
    square = torch.tensor([[0.0, 0.0], [3.0, 5.0], [3.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(aggregate(square).value, torch.tensor([1.5, 2.5], dtype=torch.float64))


def test_one_client_returns_its_own_update_bit_for_bit() -> None:
    update = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    result = aggregate(update)
    assert torch.equal(result.value, update[0])
    assert (result.gap, result.iterations) == (0.0, 0)
    assert result.value.data_ptr() != update.data_ptr()


def test_two_equal_clients_meet_in_the_middle_and_unequal_ones_at_the_heavier() -> None:
    pair = torch.tensor([[0.0, 2.0], [4.0, 0.0]])
    assert aggregate(pair).value.tolist() == [2.0, 1.0]
    assert aggregate(pair, prior_weights=[1, 2]).value.tolist() == [4.0, 0.0]


def test_even_number_on_a_line_gives_the_middle_of_the_two_inner_updates() -> None:
    line = torch.tensor([[5.0], [0.0], [1.0], [3.0]])
    assert aggregate(line).value.tolist() == [2.0]
    assert aggregate(line.flip(0)).value.tolist() == [2.0]


def test_duplicates_of_half_the_weight_win_and_two_equal_groups_meet_in_the_middle() -> None:
    a, b, c = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).unbind()
    assert torch.equal(aggregate(torch.stack([b, a, c, a])).value, a)
    torch.testing.assert_close(aggregate(torch.stack([b, a, a, b])).value, (a + b) / 2)


def test_identical_updates_return_themselves() -> None:
    update = torch.randn(7, generator=torch.Generator().manual_seed(2))
    result = aggregate(update.repeat(5, 1))
    assert torch.equal(result.value, update)
    assert (result.gap, result.objective) == (0.0, 0.0)


def test_all_zero_updates_give_zero() -> None:
    assert aggregate(torch.zeros(4, 3)).value.tolist() == [0.0, 0.0, 0.0]


def test_clients_of_zero_weight_are_left_out_and_not_even_read() -> None:
    updates = torch.randn(5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = aggregate(updates[[0, 2, 3]])
    updates[1], updates[4] = math.nan, math.inf
    result = aggregate(updates, prior_weights=[1, 0, 1, 1, 0])
    torch.testing.assert_close(result.value, expected.value)
    assert result.weights[[1, 4]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-100, -60, -30, 30, 60, 100])
def test_weights_do_not_depend_on_the_scale(dtype: torch.dtype, exponent: int) -> None:
    updates = torch.randn(7, 50, generator=torch.Generator().manual_seed(5), dtype=dtype)
    plain, scaled = aggregate(updates), aggregate(updates * 2.0**exponent)
    torch.testing.assert_close(scaled.weights, plain.weights, atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled.value, plain.value * 2.0**exponent, atol=0, rtol=1e-5)
    assert scaled.objective == pytest.approx(plain.objective * 2.0**exponent, rel=1e-9)


def test_extreme_float64_scales_are_as_exact_as_ordinary_ones() -> None:
    updates = torch.randn(7, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plain = aggregate(updates)
    for exponent in (-900, 900):
        scaled = aggregate(updates * 2.0**exponent)
        torch.testing.assert_close(scaled.weights, plain.weights, atol=1e-12, rtol=0)
        assert scaled.objective == pytest.approx(plain.objective * 2.0**exponent, rel=1e-9)


def test_median_ignores_one_far_client() -> None:
    updates = torch.randn(10, 20, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    updates[3] *= 1e12
    result = aggregate(updates)
    honest = torch.cat([updates[:3], updates[4:]])
    spread = torch.linalg.vector_norm(honest - honest.mean(0), dim=1).max()
    assert torch.linalg.vector_norm(result.value - honest.mean(0)) < spread
    assert float(result.weights[3]) < 1e-9
    assert result.majority_gap < 1e-9


rows = (
    st.integers(2, 9)
    .flatmap(
        lambda count: st.lists(
            st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=count, max_size=count
        )
    )
    .map(lambda values: torch.tensor(values, dtype=torch.float64))
)


def assert_equally_good(updates: Tensor, point: Tensor) -> None:
    """The point is a median of the updates: where minimisers are many, or nearly so, only the objective tells."""
    prior = torch.full((len(updates),), 1 / len(updates), dtype=torch.float64)
    best = float(objective(updates, aggregate(updates).value, prior))
    size = float(updates.abs().max())
    assert float(objective(updates, point, prior)) <= best * (1 + 1e-9) + 1e-9 * size


@given(rows, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_of_clients_does_not_matter(updates: Tensor, random: object) -> None:
    order = list(range(len(updates)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert_equally_good(updates, aggregate(updates[order]).value)


@given(rows, st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_median_moves_with_the_updates(updates: Tensor, shift: list[float]) -> None:
    moved = updates + torch.tensor(shift, dtype=torch.float64)
    assert_equally_good(moved, aggregate(updates).value + torch.tensor(shift, dtype=torch.float64))


@given(rows, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_median_turns_with_the_updates(updates: Tensor, seed: int) -> None:
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(matrix)[0]
    assert_equally_good(updates @ rotation, aggregate(updates).value @ rotation)


@given(st.integers(3, 15), st.integers(0, 10_000), st.floats(0, 12), st.sampled_from(["same", "spread", "close"]))
@settings(max_examples=80, deadline=None)
def test_a_minority_moves_the_median_by_a_bounded_amount(count: int, seed: int, magnitude: float, kind: str) -> None:
    """|median - m| <= 2 / (1 - 2 alpha) * largest distance of an honest update from m; the mean has no such bound."""
    generator = torch.Generator().manual_seed(seed)
    bad = (count - 1) // 2
    updates = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    attack = torch.randn(1 if kind == "same" else bad, 8, generator=generator, dtype=torch.float64)
    updates[:bad] = 10.0**magnitude * attack + (updates[:bad] if kind == "close" else 0)
    honest = updates[bad:]
    middle = honest.mean(0)
    spread = float(torch.linalg.vector_norm(honest - middle, dim=1).max())
    moved = float(torch.linalg.vector_norm(aggregate(updates).value - middle))
    assert moved <= 2 / (1 - 2 * bad / count) * spread * (1 + 1e-9)


def test_the_mean_is_moved_without_bound() -> None:
    updates = torch.randn(10, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for size in (1e3, 1e6, 1e9):
        updates[0] = size
        assert float(torch.linalg.vector_norm(updates.mean(0))) > size / 10
        assert float(torch.linalg.vector_norm(aggregate(updates).value)) < 10


lines = st.integers(1, 7).flatmap(
    lambda half: st.tuples(
        st.lists(st.floats(-2, 2, width=32), min_size=2 * half, max_size=2 * half),
        st.integers(0, 2 * half),
        st.sampled_from([1.0, 30.0, 1e3, 1e5, 1e8]),
        st.sampled_from([(1.0,), (1.0, -1.0), (0.5, 0.25, -2.0)]),
    )
)


@given(lines, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_on_a_line_the_middle_of_the_inner_two_is_the_answer_in_every_order(
    drawn: tuple[list[float], int, float, tuple[float, ...]], random: object
) -> None:
    """Two clusters far from each other, of equal or other numbers: nothing there but the order tells the updates."""
    values, moved, far, direction = drawn
    places = torch.tensor(values).double()
    places[:moved] += far
    updates = places[:, None] * torch.tensor(direction, dtype=torch.float64)
    prior = torch.full((len(values),), 1 / len(values), dtype=torch.float64)
    ordered = places.sort().values
    inner = ordered[len(values) // 2 - 1 : len(values) // 2 + 1]
    expected = inner.mean() * torch.tensor(direction, dtype=torch.float64)
    order = list(range(len(values)))
    for _ in range(3):
        result = aggregate(updates[order])
        torch.testing.assert_close(result.value, expected, atol=1e-12 * far, rtol=1e-12)
        assert float(result.weights.min()) >= 0
        assert float(result.weights.sum()) == pytest.approx(1, abs=1e-15)
        reached = float(objective(updates, result.weights @ updates[order], prior))
        assert reached == pytest.approx(result.objective, rel=1e-12, abs=1e-15 * far)
        assert reached <= float(objective(updates, expected, prior)) * (1 + result.gap) + 1e-15 * far
        random.shuffle(order)  # type: ignore[attr-defined]


def test_a_tolerance_below_rounding_changes_no_answer_on_a_line() -> None:
    line = torch.tensor([[1e3], [1.5], [999.0], [0.0]], dtype=torch.float64)
    result = aggregate(line, rule=functools.partial(geometric_median, tolerance=1e-17))
    assert result.value.tolist() == [500.25]
    assert not result.converged


def test_unequal_weights_on_a_line_take_the_weighted_median() -> None:
    line = torch.tensor([[5.0], [0.0], [1.0], [3.0], [1003.0]])
    assert aggregate(line, prior_weights=[1, 2, 3, 1, 5]).value.tolist() == [4.0]
    assert aggregate(line, prior_weights=[0.1, 0.2, 0.4, 0.1, 0.6]).value.tolist() == [4.0]
    assert aggregate(line, prior_weights=[1, 2, 4, 1, 5]).value.tolist() == [3.0]


@pytest.mark.parametrize("aside", [1e-9, 1e-8, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("far", [1.0, 1e3, 1e5])
def test_near_a_line_the_weights_are_those_of_a_mean_and_the_objective_is_that_of_the_value(
    aside: float, far: float
) -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        count = 2 * int(torch.randint(1, 8, (1,), generator=generator))
        places = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        places[: count // 2] += far
        direction = torch.nn.functional.normalize(torch.randn(1, 4, generator=generator, dtype=torch.float64))
        updates = places * direction + aside * far * torch.randn(count, 4, generator=generator, dtype=torch.float64)
        result = aggregate(updates)
        assert float(result.weights.min()) >= -0.02
        assert float(result.weights.sum()) == pytest.approx(1, abs=1e-13)
        prior = torch.full((count,), 1 / count, dtype=torch.float64)
        reached = float(objective(updates, result.value, prior))
        assert reached == pytest.approx(result.objective, rel=1e-9)
        best = float(objective(updates.expand(count, -1, -1), updates, prior).min())
        assert reached / best - 1 <= result.gap + 1e-13
