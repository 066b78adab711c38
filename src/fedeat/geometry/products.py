"""Inner products and weighted sums of rows: by compiled tiles where the package was built with them, else by torch.

`_products.c` reads float32 vectors where they lie in memory, so that clients' tensors need not be gathered into blocks,
and forms one triangle only. Everything else, and a package that was installed without a compiler, goes through torch.
The two differ in last bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedeat.geometry.layout import Piece

try:
    import fedeat.geometry._products as _products

    COMPILED = True
    HALF_PRECISION = _products.half_precision()
    """Whether the processor multiplies bfloat16 twice as fast as float32."""
except ImportError:
    COMPILED = HALF_PRECISION = False

PIECE = 2064
"""Coordinates whose products are summed in float32: few enough to stay exact to 1e-8. Not a power of two, because rows
of a block are a multiple of this apart, and rows a power of two apart share the same few cache sets."""
_CHUNK = 2048
"""The same of compiled tiles, which read rows wherever they lie."""
_SHARE = 1 << 17
"""Coordinates that are worth a thread of their own."""

Integers: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Stretches:
    """Float32 coordinates of n clients that the compiled routines read where they lie in memory.

    They believe the addresses: each must be that of as many numbers without gaps, which somebody keeps alive.

    Attributes:
        addresses: (k, n) int64, where each of k stretches begins for each client.
        lengths: (k,) int64, coordinates of each stretch.
        held: what the addresses point into, where nobody else keeps it.
    """

    addresses: Integers
    lengths: Integers
    held: object = None

    def shares(self) -> list[Stretches]:
        """The same coordinates as equal parts, one for each of torch's threads where that is worth it."""
        ends = np.cumsum(self.lengths)
        threads = max(1, min(torch.get_num_threads(), int(ends[-1]) // _SHARE))
        if threads == 1:
            return [self]
        starts = ends - self.lengths
        found = []
        for begin, end in itertools.pairwise(int(ends[-1]) * thread // threads for thread in range(threads + 1)):
            some = (starts < end) & (ends > begin)
            skipped = np.maximum(begin - starts[some], 0)
            lengths = np.minimum(end - starts[some], self.lengths[some]) - skipped
            found.append(Stretches(self.addresses[some] + 4 * skipped[:, None], lengths))
        return found


def in_place(piece: Piece) -> Stretches | None:
    """One stretch, of float32 vectors as long as each other, without gaps and in main memory; None for all else."""
    if not COMPILED:
        return None
    rows = [piece] if isinstance(piece, Tensor) else piece
    shape = rows[0].shape
    if not all(
        row.dtype is torch.float32 and row.is_cpu and row.shape == shape and row.stride(-1) == 1 for row in rows
    ):
        return None
    if isinstance(piece, Tensor):
        first, step = piece.data_ptr(), 4 * piece.stride(0)
        addresses = [first + step * row for row in range(len(piece))]
    else:
        addresses = [row.data_ptr() for row in piece]
    return Stretches(np.array([addresses]), np.array([length(piece)]), piece)


def accumulate(total: Tensor, rows: Tensor | Stretches, *, centre: int | None = None) -> None:
    """Adds the products `<x_i - z, x_j - z>` of i <= j to a matrix, and some of the others: read its upper triangle.

    Args:
        total: (n, n) float64, written to.
        rows: coordinates of n clients: (n, c) float32 or float64, or stretches.
        centre: client whose coordinates are z; None for zero.
    """
    read = in_place(rows) if isinstance(rows, Tensor) else rows
    if read is None:
        assert isinstance(rows, Tensor)
        _accumulate(total, rows if centre is None else rows - rows[centre])
        return
    reference = -1 if centre is None else centre

    def add(share: Stretches, found: Tensor) -> None:
        _products.accumulate(share.addresses, share.lengths, reference, _CHUNK, found.data_ptr())

    _into(total, add, read.shares())


def accumulate_half(total: Tensor, rows: Tensor | Stretches, whole: int) -> None:
    """Adds the products of i < j of coordinates rounded to bfloat16, and what tells how wrong they are.

    To be called where `HALF_PRECISION` holds, of coordinates in main memory.

    Args:
        total: (n, n + 3) float64, written to: the products, and in the last three columns those of each client with
            itself, with itself rounded, and with the client `whole`; what is not said to be rounded is not.
        rows: float32 coordinates x of n clients; a matrix whose rows have gaps is copied.
        whole: number of a client.
    """
    read = rows if isinstance(rows, Stretches) else in_place(rows) or in_place(rows.contiguous())
    assert read is not None
    count = len(total)
    found = torch.zeros(count * (count + 3), dtype=torch.float64)

    def add(share: Stretches, found: Tensor) -> None:
        sums = found[count * count :]
        _products.accumulate_half(share.addresses, share.lengths, whole, found.data_ptr(), sums.data_ptr())

    _into(found, add, read.shares())
    total[:, :count] += found[: count * count].view(count, count)
    total[:, count:] += found[count * count :].view(count, 3)


def combine(rows: Stretches, weights: Tensor, out: Sequence[Tensor]) -> None:
    """Writes `sum_i weights_i x_i`.

    Args:
        rows: coordinates of n clients.
        weights: (n,), taken as float32.
        out: a vector for each stretch, float32 without gaps, written to.
    """
    factors = weights.to("cpu", torch.float32).contiguous()

    def write(share: Stretches) -> None:
        _products.combine(share.addresses, share.lengths, factors.data_ptr())

    _side_by_side(write, _aimed(rows, out).shares())


def distances(rows: Stretches, weights: Tensor, out: Sequence[Tensor], squares: Tensor) -> None:
    """`combine`, and adds the squared distance of every client from that sum.

    Args:
        rows: coordinates of n clients.
        weights: (n,), taken as float32.
        out: a vector for each stretch, float32 without gaps, written to.
        squares: (n,) float64, added to.
    """
    factors = weights.to("cpu", torch.float32).contiguous()

    def add(share: Stretches, found: Tensor) -> None:
        _products.distances(share.addresses, share.lengths, factors.data_ptr(), _CHUNK, found.data_ptr())

    _into(squares, add, _aimed(rows, out).shares())


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix of an upper triangle, in main memory."""
    found = upper.cpu().numpy()
    return torch.from_numpy(np.where(_below(len(found)), found.T, found))


@functools.lru_cache(maxsize=8)
def _below(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Where a square matrix is below its diagonal."""
    return np.tri(count, k=-1, dtype=bool)


def length(piece: Piece) -> int:
    """Number of coordinates."""
    return piece.shape[1] if isinstance(piece, Tensor) else len(piece[0])


def _aimed(rows: Stretches, out: Sequence[Tensor]) -> Stretches:
    """With one more address for each stretch, which is written to as if it were another client's."""
    return Stretches(np.column_stack([rows.addresses, [vector.data_ptr() for vector in out]]), rows.lengths)


def _into(total: Tensor, add: Callable[[Stretches, Tensor], None], shares: Sequence[Stretches]) -> None:
    """Has every share add to a sum: threads to sums of their own, which are added in their order."""
    others = [torch.zeros_like(total) for _ in shares[1:]]
    _side_by_side(add, shares, [total, *others])
    for found in others:
        total += found


def _side_by_side(work: Callable[..., None], shares: Sequence[Stretches], *own: Sequence[Tensor]) -> None:
    """Calls `work(share, ...)` for every share, in threads; the routines let go of the lock."""
    if len(shares) == 1:
        work(shares[0], *(each[0] for each in own))
        return
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(work, shares, *own))


def _accumulate(total: Tensor, rows: Tensor) -> None:
    """The same by torch, of (n, c) rows. Float32 products are summed in float32 over short pieces only.

    From 48 clients on, the triangle is cut into strips: half of the products are each other's mirror image.
    """
    count, whole = len(rows), rows.shape[1] // PIECE * PIECE if rows.dtype == torch.float32 else 0
    strips = 1 if count < 48 else 3
    cuts = [count * strip // strips for strip in range(strips + 1)]
    pieces = rows[:, :whole].view(count, -1, PIECE).transpose(0, 1) if whole else rows[None, :, :0]
    rest = rows[:, whole:]
    for first, last in itertools.pairwise(cuts):
        part = total[first:last, first:]
        if whole:
            products = torch.bmm(pieces[:, first:last], pieces[:, first:].transpose(1, 2))
            part.add_(products[0] if len(products) == 1 else products.sum(0, dtype=torch.float64))
        if whole < rows.shape[1]:
            part.add_(rest[first:last] @ rest[first:].T)
