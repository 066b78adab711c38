"""Partitions: every example once, every client fed, the same on every machine."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeat.data.partition import Partition, by_column, by_task, dirichlet, iid, quantity
from fedeat.errors import DataError

GROUPS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=60)


def check(parts: Partition, examples: int) -> None:
    assert sorted(index for part in parts for index in part) == list(range(examples))
    assert all(part and list(part) == sorted(part) for part in parts)
    assert all(type(index) is int for part in parts for index in part)


@settings(max_examples=80, deadline=None)
@given(examples=st.integers(1, 60), data=st.data(), seed=st.integers(0, 3))
def test_iid_shares_differ_by_at_most_one(examples: int, data: st.DataObject, seed: int) -> None:
    clients = data.draw(st.integers(1, examples))
    parts = iid(examples, clients, seed=seed)
    check(parts, examples)
    assert len(parts) == clients
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == iid(examples, clients, seed=seed)


@settings(max_examples=150, deadline=None)
@given(
    groups=GROUPS, data=st.data(), alpha=st.sampled_from([1e-8, 1e-3, 0.1, 0.5, 1.0, 1e3, 1e8]), seed=st.integers(0, 9)
)
def test_dirichlet_is_a_partition_at_every_concentration(
    groups: list[str], data: st.DataObject, alpha: float, seed: int
) -> None:
    clients = data.draw(st.integers(1, len(groups)))
    parts = dirichlet(groups, clients, alpha=alpha, seed=seed)
    check(parts, len(groups))
    assert len(parts) == clients
    assert parts == dirichlet(groups, clients, alpha=alpha, seed=seed)


@settings(max_examples=50, deadline=None)
@given(groups=GROUPS)
def test_column_gives_a_client_for_each_value(groups: list[str]) -> None:
    parts = by_column(groups)
    check(parts, len(groups))
    assert [{groups[i] for i in part} for part in parts] == [{name} for name in sorted(set(groups))]


@settings(max_examples=80, deadline=None)
@given(
    examples=st.integers(1, 60), data=st.data(), alpha=st.sampled_from([1e-8, 0.1, 1.0, 1e8]), seed=st.integers(0, 3)
)
def test_quantity_skew_is_a_partition_at_every_concentration(
    examples: int, data: st.DataObject, alpha: float, seed: int
) -> None:
    clients = data.draw(st.integers(1, examples))
    parts = quantity(examples, clients, alpha=alpha, seed=seed)
    check(parts, examples)
    assert len(parts) == clients
    assert parts == quantity(examples, clients, alpha=alpha, seed=seed)


def test_amounts_are_skewed_at_small_alpha_and_even_at_large() -> None:
    sizes = [sorted(map(len, quantity(1000, 10, alpha=alpha, seed=3))) for alpha in (0.1, 1e6)]
    assert sizes[0][-1] > 400
    assert sizes[1][-1] - sizes[1][0] <= 5


@settings(max_examples=80, deadline=None)
@given(groups=st.lists(st.sampled_from(["a", "b", "c"]), min_size=30, max_size=60), extra=st.integers(0, 4))
def test_task_skew_gives_each_client_one_task(groups: list[str], extra: int) -> None:
    names = sorted(set(groups))
    smallest = min(map(groups.count, names))
    clients = min(len(names) + extra, len(names) * smallest)
    parts = by_task(groups, clients, seed=1)
    check(parts, len(groups))
    assert [{groups[i] for i in part} for part in parts] == [{names[c % len(names)]} for c in range(clients)]
    for name in names:
        sizes = [len(part) for part in parts if groups[part[0]] == name]
        assert max(sizes) - min(sizes) <= 1


def test_fewer_clients_than_tasks_are_refused() -> None:
    with pytest.raises(DataError, match="2 clients cannot hold one task each of 3: a, b, c"):
        by_task(["a", "b", "c"] * 4, 2, seed=0)
    with pytest.raises(DataError, match="1 training example of task 'a' cannot be spread over 2 clients"):
        by_task(["a", "b", "b"], 4, seed=0)


def test_clients_of_a_column_are_in_natural_order() -> None:
    parts = by_column(["10", "2", "b", "a", "2"])
    assert parts == ((1, 4), (0,), (3,), (2,))


def spread(parts: Partition, groups: list[str]) -> float:
    """Mean share of a client's commonest group."""
    shares = [Counter(groups[i] for i in part).most_common(1)[0][1] / len(part) for part in parts]
    return sum(shares) / len(shares)


def test_small_concentration_skews_and_large_is_even() -> None:
    groups = [name for name in "abcd" for _ in range(500)]
    skews = [spread(dirichlet(groups, 10, alpha=alpha, seed=0), groups) for alpha in (0.05, 0.5, 1e6)]
    assert skews[0] > 0.8 > skews[1] > 0.4 > skews[2]
    assert skews[2] == pytest.approx(0.25, abs=0.01)


def test_other_seed_gives_another_partition() -> None:
    assert iid(50, 5, seed=0) != iid(50, 5, seed=1)
    groups = ["a", "b"] * 25
    assert dirichlet(groups, 5, alpha=0.5, seed=0) != dirichlet(groups, 5, alpha=0.5, seed=1)


def test_fewer_examples_than_clients_are_refused() -> None:
    for make in (lambda: iid(3, 4, seed=0), lambda: dirichlet(["a"] * 3, 4, alpha=1.0, seed=0)):
        with pytest.raises(DataError, match="3 training examples cannot be spread over 4 clients"):
            make()
    with pytest.raises(DataError, match="0 training examples"):
        by_column([])
