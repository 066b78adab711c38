"""Compiled and plain products agree with float64 sums, wherever the rows lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fedeat import geometry
from fedeat.geometry import products
from fedeat.geometry.products import Stretches
from fedeat.geometry.sources import open_updates, pieces

needs_compiled = pytest.mark.skipif(not products.COMPILED, reason="installed without a compiler")


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of forming products, whatever this package was installed with."""
    if request.param == "compiled" and not products.COMPILED:
        pytest.skip("installed without a compiler")
    if request.param == "torch":
        monkeypatch.setattr(products, "COMPILED", False)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[int]:
    """More threads than one, for as long as a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def rows(count: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def stretches(rows: Tensor | Sequence[Tensor]) -> Stretches:
    """One stretch, of a matrix or of a vector a client."""
    found = products.in_place(rows)
    assert found is not None
    return found


def apart(parts: Sequence[Tensor]) -> Stretches:
    """One stretch for each matrix (n, c)."""
    each = [stretches(part) for part in parts]
    addresses = np.concatenate([one.addresses for one in each])
    return Stretches(addresses, np.concatenate([one.lengths for one in each]), parts)


def exact(updates: Tensor, centre: int | None = None) -> Tensor:
    doubles = updates.double()
    away = doubles if centre is None else doubles - doubles[centre]
    return away @ away.T


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 11, 53])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 2047, 2049, 5000])
def test_products_of_any_shape_are_those_of_float64(way: str, count: int, columns: int) -> None:
    updates = rows(count, columns)
    total = torch.zeros(count, count, dtype=torch.float64)
    products.accumulate(total, updates)
    norms = exact(updates).diagonal().sqrt()
    assert float(((products.mirrored(total) - exact(updates)).abs() / torch.outer(norms, norms)).max()) < 1e-6


needs_half_precision = pytest.mark.skipif(not products.HALF_PRECISION, reason="a processor without AVX512-BF16")


@needs_half_precision
@pytest.mark.parametrize("count", [1, 4, 5, 11, 53])
@pytest.mark.parametrize("columns", [1, 15, 16, 31, 33, 1536, 5000])
def test_half_precision_rounds_the_factors_of_products_of_two_clients_and_nothing_else(
    count: int, columns: int
) -> None:
    updates, whole = rows(count, columns), count // 2
    total = torch.zeros(count, count + 3, dtype=torch.float64)
    products.accumulate_half(total, updates, whole)
    halves, singles = exact(updates.bfloat16()).triu(1), exact(updates)
    norms = singles.diagonal().sqrt()
    rounded = (updates.double() * updates.bfloat16().double()).sum(1)
    assert float(((total[:, :count].triu(1) - halves).abs() / torch.outer(norms, norms)).max()) < 1e-6
    torch.testing.assert_close(total[:, count], singles.diagonal(), rtol=1e-6, atol=0)
    torch.testing.assert_close(total[:, count + 1], rounded, rtol=1e-6, atol=0)
    assert float(((total[:, count + 2] - singles[whole]).abs() / (norms * norms[whole])).max()) < 1e-6


@needs_half_precision
def test_half_precision_copies_rows_with_gaps() -> None:
    updates, total, known = rows(500, 7).T, *torch.zeros(2, 7, 10, dtype=torch.float64)
    products.accumulate_half(total, updates, 2)
    products.accumulate_half(known, updates.contiguous(), 2)
    assert torch.equal(total, known)


@needs_half_precision
def test_half_precision_adds_up_stretches_and_threads(threads: int) -> None:
    updates = [rows(6, 200_000), rows(6, 99), rows(6, 150_001, seed=1)]
    total = torch.zeros(6, 9, dtype=torch.float64)
    products.accumulate_half(total, apart(updates), 4)
    wanted = exact(torch.cat(updates, dim=1))
    size = float(wanted.max())
    torch.testing.assert_close(total[:, :6].triu(1), wanted.triu(1), rtol=1e-5, atol=1e-4 * size)
    torch.testing.assert_close(total[:, 8], wanted[4], rtol=1e-6, atol=1e-6 * size)


@pytest.mark.parametrize("columns", [100, 4099])
def test_a_reference_is_subtracted_before_digits_are_lost(way: str, columns: int) -> None:
    updates = 1e4 + rows(7, columns)
    total = torch.zeros(7, 7, dtype=torch.float64)
    products.accumulate(total, updates, centre=3)
    found, wanted = products.mirrored(total), exact(updates, 3)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()))
    assert not found[3].any()


def test_what_was_there_is_added_to(way: str) -> None:
    updates = rows(6, 3000)
    whole, halves = (torch.zeros(6, 6, dtype=torch.float64) for _ in range(2))
    products.accumulate(whole, updates)
    for half in (updates[:, :1111], updates[:, 1111:]):
        products.accumulate(halves, half)
    assert torch.allclose(products.mirrored(whole), products.mirrored(halves), rtol=1e-6, atol=1e-4)


@needs_compiled
def test_vectors_are_read_where_they_lie() -> None:
    matrix = rows(9, 6000)
    odd = [row.clone()[1:] for row in torch.cat([matrix[:, :1], matrix], 1)]  # 4 bytes past any alignment
    together, separate = (torch.zeros(9, 9, dtype=torch.float64) for _ in range(2))
    products.accumulate(together, matrix)
    products.accumulate(separate, stretches(odd))
    assert torch.equal(together, separate)


@needs_compiled
def test_stretches_are_read_one_after_the_other() -> None:
    matrix, weights = rows(7, 5000), rows(1, 7)[0]
    several = apart([part.contiguous() for part in torch.split(matrix, [3, 1200, 0, 3797], dim=1)])
    for centre in (None, 2):
        total = torch.zeros(7, 7, dtype=torch.float64)
        products.accumulate(total, several, centre=centre)
        assert torch.allclose(products.mirrored(total), exact(matrix, centre), rtol=1e-5, atol=1e-2)
    whole, out, squares = torch.empty(5000), torch.empty(5000), torch.zeros(2, 7, dtype=torch.float64)
    products.distances(stretches(matrix), weights, [whole], squares[0])
    products.distances(several, weights, torch.split(out, [3, 1200, 0, 3797]), squares[1])
    assert torch.equal(out, whole)
    assert torch.allclose(squares[0], squares[1])


@needs_compiled
def test_shares_cut_stretches_and_lose_nothing(threads: int) -> None:
    lengths = [1, 300_000, 0, 70_000, 200_000]
    held = torch.arange(sum(lengths), dtype=torch.float32)
    several = apart([part[None] for part in torch.split(held, lengths)])
    shares = several.shares()
    assert [int(share.lengths.sum()) for share in shares] == pytest.approx([190_000] * threads, abs=1)
    read = [
        (address - held.data_ptr()) // 4 + torch.arange(length)
        for share in shares
        for (address,), length in zip(share.addresses.tolist(), share.lengths.tolist(), strict=True)
    ]
    assert torch.equal(torch.cat(read), torch.arange(len(held)))


@needs_compiled
def test_threads_change_the_order_of_sums_alone(threads: int) -> None:
    updates = rows(5, 3 * (1 << 17) + 5)
    total, out = torch.zeros(5, 5, dtype=torch.float64), torch.empty(updates.shape[1])
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    products.accumulate(total, updates, centre=1)
    assert torch.allclose(products.mirrored(total), exact(updates, 1), rtol=1e-6, atol=1e-2)
    products.combine(stretches(updates), weights, [out])
    assert torch.allclose(out, weights @ updates, atol=1e-6)
    squares = torch.zeros(5, dtype=torch.float64)
    products.distances(stretches(updates), weights, [out], squares)
    assert torch.allclose(squares, (updates - out).double().square().sum(1), rtol=1e-5)


@needs_compiled
@pytest.mark.parametrize("columns", [5001, 70_001])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 25])
def test_combinations_are_weighted_sums(count: int, columns: int) -> None:
    updates, weights, out = rows(count, columns), rows(1, count)[0], torch.full((columns,), torch.nan)
    products.combine(stretches(updates), weights, [out])
    assert torch.allclose(out.double(), weights.double() @ updates.double(), atol=1e-5)


@needs_compiled
@pytest.mark.parametrize("offset", [0, 1, 5, 7, 8])
def test_a_long_sum_is_written_to_any_address_and_nowhere_else(offset: int) -> None:
    """From a megabyte on it goes past the caches, by writes that want multiples of the vectors' size."""
    updates, weights = rows(10, 300_003), rows(1, 10)[0]
    held = torch.full((300_100,), torch.nan)
    out = held[40 + offset :][:300_003]
    products.combine(stretches(updates), weights, [out])
    assert torch.allclose(out.double(), weights.double() @ updates.double(), atol=1e-5)
    assert torch.isnan(held[: 40 + offset]).all()
    assert torch.isnan(held[40 + offset + 300_003 :]).all()


@needs_compiled
@pytest.mark.parametrize("columns", [3, 2048, 7001])
def test_distances_are_those_from_the_combination(columns: int) -> None:
    updates, weights, out = 1e3 + rows(9, columns), torch.full((9,), 1 / 9), torch.empty(columns)
    squares = torch.ones(9, dtype=torch.float64)
    products.distances(stretches(updates), weights, [out], squares)
    again = torch.empty_like(out)
    products.combine(stretches(updates), weights, [again])
    assert torch.equal(out, again)
    assert torch.allclose(squares - 1, (updates.double() - out.double()).square().sum(1), rtol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_rows(way: str, bad: float) -> None:
    updates = rows(6, 3000)
    updates[4, 2999] = bad
    total = torch.zeros(6, 6, dtype=torch.float64)
    products.accumulate(total, updates)
    finite = torch.isfinite(products.mirrored(total).diagonal())
    assert finite.tolist() == [True, True, True, True, False, True]


@needs_compiled
def test_only_float32_vectors_without_gaps_are_read_in_place() -> None:
    updates = rows(3, 40)
    for readable in (updates, updates[::2], list(updates)):
        assert products.in_place(readable) is not None
    for other in (updates.double(), updates.bfloat16(), updates[:, ::2], updates.T):
        assert products.in_place(other) is None
        assert products.in_place(list(other)) is None


def test_pieces_cover_every_coordinate_once_whatever_holds_them(way: str) -> None:
    layout = {"a": (30, 10), "b": (0,), "c": (7,), "half": (9,), "t": (40, 3)}
    clients = [
        {name: rows(1, max(1, torch.Size(shape).numel()), i)[0] for name, shape in layout.items()} for i in range(4)
    ]
    updates = [
        {name: tensor[: torch.Size(layout[name]).numel()].reshape(layout[name]) for name, tensor in c.items()}
        for c in clients
    ]
    for update in updates:
        update["half"] = update["half"].bfloat16()
        update["t"] = update["t"].T
    flat = torch.stack([torch.cat([update[name].float().reshape(-1) for name in layout]) for update in updates])
    seen = {name: torch.zeros(torch.Size(shape).numel(), dtype=torch.int) for name, shape in layout.items()}
    for segments, piece in pieces(open_updates(updates)):
        assert isinstance(piece, Tensor) or len(piece.lengths) == len(segments)
        for segment in segments:
            seen[segment.name][segment.start : segment.stop] += 1
    assert all(bool((count == 1).all()) for count in seen.values())
    assert torch.allclose(geometry.gram(updates), exact(flat), rtol=1e-5, atol=1e-4)
