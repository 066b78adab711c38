"""Distances of all updates from a weighted sum of them, measured coordinate by coordinate.

Inner products may come from a sample of the coordinates, or from rounded ones. What they say is near enough to go on
with; what these distances say is so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedeat.geometry import products
from fedeat.geometry.assembly import Assembly
from fedeat.geometry.layout import UpdateSource
from fedeat.geometry.products import Stretches
from fedeat.geometry.sources import blocks, pieces

_CANCELLATION = 64
"""By how much squared norms may exceed the squared distance that is their difference: six of 24 bits are lost."""


def distances_from_sum(source: UpdateSource, weights: Tensor) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
    """(n,) float64 distances of all updates from their weighted sum y, and y, in one reading or two.

    Compiled, y is subtracted while a block is in the cache. By torch, `|x_i|^2 - 2 <x_i, y> + |y|^2` takes half the
    time of that; where it loses digits, because updates share a large common part, y is subtracted after all.

    Args:
        source: n updates.
        weights: (n,) finite.
    """
    squares = torch.zeros(len(weights), dtype=torch.float64, device=source.device)
    norms, along, square = torch.zeros_like(squares), torch.zeros_like(squares), torch.zeros_like(squares[0])
    result = Assembly(source)
    for segments, piece in pieces(source):
        if isinstance(piece, Stretches):
            products.distances(piece, weights, result.parts(segments), squares)
        else:
            point = torch.mv(piece.T, weights.to(piece.device, piece.dtype))
            result.write(segments, point)
            along += torch.mv(piece, point)
            norms += torch.linalg.vector_norm(piece, dim=1).double() ** 2
            square += torch.dot(point, point)
    expanded = norms - 2 * along + square
    if not bool((norms + square <= _CANCELLATION * expanded).all()):
        squares.zero_()
        expanded.zero_()
        for _, block in blocks(source):
            away = block - torch.mv(block.T, weights.to(block.device, block.dtype))
            squares += torch.linalg.vector_norm(away, dim=1).double() ** 2
    return (squares + expanded).sqrt().cpu(), result.value()
