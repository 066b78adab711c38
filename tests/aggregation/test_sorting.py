"""Order statistics by the network against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedeat.aggregation.sorting import MOST_ROWS, network, ranked


@given(st.integers(1, 40), st.data())
def test_ranks_are_those_of_sorting_and_the_input_stays(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    columns = torch.randn(count, 17, generator=torch.Generator().manual_seed(count))
    columns[count // 2] = columns[0]  # ties
    before = columns.clone()
    assert torch.equal(ranked(columns, first, last), columns.sort(dim=0).values[first : last + 1])
    assert torch.equal(columns, before)


def test_every_pattern_of_zeros_and_ones_is_sorted() -> None:
    # A network that sorts all patterns of zeros and ones sorts everything (Knuth 5.3.4, theorem Z).
    patterns = torch.tensor([[number >> wire & 1 for number in range(2**10)] for wire in range(10)]).float()
    assert torch.equal(ranked(patterns, 0, 9), patterns.sort(dim=0).values)


def test_what_no_wanted_rank_needs_is_left_out() -> None:
    assert len(network(10, 4, 5)) < len(network(10, 0, 9))
    assert network(1, 0, 0) == ()


@pytest.mark.parametrize("count", [MOST_ROWS, MOST_ROWS + 1])
def test_many_rows_give_the_same_answer(count: int) -> None:
    columns = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    middle = count // 2
    assert torch.equal(ranked(columns, middle, middle)[0], columns.sort(dim=0).values[middle])
