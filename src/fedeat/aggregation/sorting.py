"""Order statistics of every coordinate by a sorting network whose wires are whole rows.

Sorting columns one by one is what a processor does badly: it compares, branches and carries indices. A network compares
fixed pairs of rows, and a comparison of two rows is one minimum and one maximum over all coordinates at full width.
Batcher's odd-even merge sort (Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M) needs about
`n log2(n)^2 / 4` of them, and what does not reach a wanted rank is left out.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MOST_ROWS = 128
"""From here on a network needs more comparisons than sorting each column costs."""


def ranked(columns: Tensor, first: int, last: int) -> Tensor:
    """The values of ranks first..last of each coordinate, in order.

    Args:
        columns: (n, c) float without NaN.
        first: >= 0, smallest rank wanted.
        last: < n, largest rank wanted.

    Returns:
        (last - first + 1, c).
    """
    if len(columns) > MOST_ROWS:
        return columns.sort(dim=0).values[first : last + 1]
    rows = list(columns.unbind())
    spare: list[Tensor] = []
    written: set[int] = set()
    for low, high in network(len(columns), first, last):
        # A row of the input is never written to; rows of our own are used again.
        smaller = torch.minimum(rows[low], rows[high], out=spare.pop() if spare else torch.empty_like(rows[low]))
        larger = torch.maximum(rows[low], rows[high], out=spare.pop() if spare else torch.empty_like(rows[low]))
        spare += [rows[wire] for wire in (low, high) if wire in written]
        written.update((low, high))
        rows[low], rows[high] = smaller, larger
    return torch.stack(rows[first : last + 1])


@functools.cache
def network(count: int, first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Comparisons (lower wire, higher wire), in order, that bring ranks first..last to their wires."""
    comparisons = []
    top = 1 << max(0, math.ceil(math.log2(count)) - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            comparisons += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    wanted = set(range(first, last + 1))
    needed = []
    for low, high in reversed(comparisons):
        if low in wanted or high in wanted:
            wanted.update((low, high))
            needed.append((low, high))
    return tuple(reversed(needed))
