"""The geometric median of large updates from a secret sample of their coordinates, corrected by exact distances.

For many clients the inner products dominate the cost. Distances on a random sample of the coordinates give weights that
are right to about the square of the sample's error. One exact reading of all coordinates then forms that point and
measures every client's distance from it, which fixes the gradient. Where a Newton step with the sample's curvature has
nothing left to gain, the point is the answer; else the step squares the error again, for another reading.

The coordinates must be drawn after the updates have arrived, by a generator no client can predict: an attacker who knew
them could be huge elsewhere. One who hides in few coordinates anyway is found by the exact distances and costs more
readings; after three the full inner products are used. Results carry no certificate: the sample's curvature proves
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedeat.aggregation.weiszfeld import ClientWeights, geometric_median, iterate, newton_direction
from fedeat.geometry import Assembly, products
from fedeat.geometry.distances import cancellation, medoid, recentred
from fedeat.geometry.layout import Segment, UpdateSource
from fedeat.geometry.products import Stretches
from fedeat.geometry.sources import blocks, pieces, sample

_LEAST_COORDINATES = 65536
_LENGTH = 1024
_MOST_READINGS = 3
_ENOUGH = 5e-7
"""Estimated relative excess of the objective at which a point that was read exactly is good enough."""
_EXCESS = 1e-8
"""The same of a point one Newton step further, which no reading has seen: a tenth is usual after one reading."""
_CANCELLATION = 64
"""By how much squared norms may exceed the squared distance that is their difference: six of 24 bits are lost."""


def sampled_geometric_median(
    source: UpdateSource, prior_weights: Tensor, generator: torch.Generator
) -> tuple[ClientWeights, int, Tensor | dict[str, Tensor] | None] | None:
    """Weights of the geometric median from a sample and a few exact readings, the number of those, and the point.

    Args:
        source: n updates.
        prior_weights: (n,) float64, > 0, summing to one.
        generator: of the secret coordinates.

    Returns:
        The point is None where the weights are of one that no reading has formed yet. All is None where a sample does
        not pay or does not suffice: few coordinates, an optimum at one client's update, values that are not finite or
        out of float32's range, or an estimate that is not small after three readings.
    """
    coordinates = sum(spec.numel for spec in source.layout.values())
    budget = max(_LEAST_COORDINATES, coordinates // 32)
    if 2 * budget > coordinates:
        return None
    segments = _draw(source, budget, coordinates, generator)
    gram = _sampled_gram(source, segments, None)
    if not _usable(gram, coordinates):
        return None
    ratio, centre = cancellation(gram, prior_weights)
    if ratio > 4:
        gram = _sampled_gram(source, segments, centre)
    gram *= coordinates / sum(segment.stop - segment.start for segment in segments)
    decided = geometric_median(gram, prior_weights)
    weights = decided.weights
    if int((weights != 0).sum()) < min(3, len(weights)):
        return None
    curvature, prior = recentred(gram, medoid(gram, prior_weights)).numpy(), prior_weights.numpy()
    for reading in range(1, _MOST_READINGS + 1):
        guessed = iterate(curvature, prior, weights.numpy())
        distances, point = _read(source, weights)
        radii = distances.numpy()
        if not np.isfinite(radii).all() or radii.min() < 1e-3 * np.median(radii):
            return None
        # Exact distances make the gradient exact, as coefficients; only the curvature is the sample's.
        pulls = prior / radii
        state = replace(guessed, radii=radii, pulls=pulls, step=pulls / pulls.sum() - guessed.coefficients)
        move = newton_direction(curvature, state)
        move = state.step if move is None else move
        objective = float(prior @ radii)
        excess = abs(float(pulls.sum()) * float(move @ (curvature @ state.step)) / objective)
        mismatch = float(np.abs(guessed.coefficients) @ np.abs(1 - guessed.radii / radii))
        if excess <= _ENOUGH and mismatch <= 0.1:
            return ClientWeights(weights, decided.iterations, objective), reading, point
        weights = weights + torch.from_numpy(move)
        if excess * (mismatch**2 + excess) <= _EXCESS:
            return ClientWeights(weights, decided.iterations + reading, objective), reading, None
    return None


def _draw(source: UpdateSource, budget: int, coordinates: int, generator: torch.Generator) -> list[Segment]:
    """Random short segments, as many coordinates of each tensor as its size deserves."""
    segments = []
    for name, spec in source.layout.items():
        share = -(-spec.numel * budget // coordinates)
        length = min(_LENGTH, spec.numel)
        if length == 0:
            continue
        places = torch.randint(spec.numel - length + 1, (-(-share // length),), generator=generator)
        segments += [Segment(name, start, start + length) for start in sorted(places.tolist())]
    return segments


def _sampled_gram(source: UpdateSource, segments: Sequence[Segment], centre: int | None) -> Tensor:
    count = len(source.labels)
    total = torch.zeros(count, count, dtype=torch.float64, device=source.device)
    for rows in sample(source, segments):
        products.accumulate(total, rows, centre=centre)
    return products.mirrored(total)


def _usable(gram: Tensor, coordinates: int) -> bool:
    """Whether products are finite and not so small that float32 lost their digits."""
    norms = gram.diagonal()
    return bool(torch.isfinite(norms).all()) and float(norms.median()) > coordinates * 1e-32


def _read(source: UpdateSource, weights: Tensor) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
    """(n,) float64 distances of all updates from their weighted sum y, and y, in one reading or two.

    Compiled, y is subtracted while a block is in the cache. By torch, `|x_i|^2 - 2 <x_i, y> + |y|^2` takes half the
    time of that; where it loses digits, because updates share a large common part, y is subtracted after all.
    """
    squares = torch.zeros(len(weights), dtype=torch.float64, device=source.device)
    norms, along, square = torch.zeros_like(squares), torch.zeros_like(squares), torch.zeros_like(squares[0])
    factors = {dtype: weights.to(source.device, dtype) for dtype in (torch.float32, torch.float64)}
    result = Assembly(source)
    for segments, piece in pieces(source):
        if isinstance(piece, Stretches):
            products.distances(piece, factors[torch.float32], result.parts(segments), squares)
        else:
            point = torch.mv(piece.T, factors[piece.dtype])
            result.write(segments, point)
            along += torch.mv(piece, point)
            norms += torch.linalg.vector_norm(piece, dim=1).double() ** 2
            square += torch.dot(point, point)
    expanded = norms - 2 * along + square
    if not bool((norms + square <= _CANCELLATION * expanded).all()):
        squares.zero_()
        expanded.zero_()
        for _, block in blocks(source):
            away = block - torch.mv(block.T, factors[block.dtype])
            squares += torch.linalg.vector_norm(away, dim=1).double() ** 2
    return (squares + expanded).sqrt().cpu(), result.value()
