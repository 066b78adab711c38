"""The n x n Gram matrix of client updates, read in one pass, and their weighted combination, read in another.

Every rule that weighs whole updates needs only their inner products: mean, geometric median, Krum and the like all
return `sum_i c_i x_i`. So the updates are read once for `K_ij = <x_i - z, x_j - z>`, the rule works on that matrix
alone, whatever the model's size, and the updates are read once more for the combination.

Products of float32, float16 and bfloat16 updates are formed in float32 by blocks and accumulated in float64. That
loses nothing that matters while updates differ by about as much as they measure. Where they share a large common
part, distances are small differences of large products; `measure` estimates that cancellation and, where it is too
strong, takes a member of the dense majority as the reference z and reads again, in float64 if need be. Centring on
the mean instead would let one huge update spoil all products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.geometry import products
from fedeat.geometry.assembly import Assembly
from fedeat.geometry.distances import cancellation, lower_median
from fedeat.geometry.layout import Segment, UpdateSource, title
from fedeat.geometry.products import PIECE, Stretches
from fedeat.geometry.sources import Updates, blocks, open_updates, pieces, sample

SMALL = 1 << 18
"""Up to this many coordinates of all clients, float64 products cost nothing worth saving."""
QUICK = 1 << 25
"""Up to this many, no sample tells a centre beforehand: a second reading about one, rarely needed, costs as little."""

_FLOAT32_ROUNDING = 2.0**-24
_FLOAT64_ROUNDING = 2.0**-53
_DISTANCE_ERROR = 1e-6
"""Largest relative error of a typical squared distance that float32 products may cause before they are redone."""


@dataclass(frozen=True)
class Geometry:
    """Inner products of n updates, and how they were come by.

    Attributes:
        gram: (n, n) float64, `<x_i - z, x_j - z> * scale**2`.
        centre: the client whose update is the reference z; None where z is zero.
        scale: power of two that keeps products of very large or very small float64 updates in range.
        rounding: relative error of one product: 2**-24 where they were formed in float32, else 2**-53.
        passes: how often the updates were read, a sample of the coordinates not counted.
        sizes: (n,) float64, the squared lengths whose rounding the products carry, where they are sums and differences
            of larger ones; None where they are no larger than `gram`'s own.
    """

    gram: Tensor
    centre: int | None
    scale: float
    rounding: float
    passes: int
    sizes: Tensor | None = None


def gram(
    updates: Updates | UpdateSource, *, centre: int | None = None, double: bool = False, scale: float = 1.0
) -> Tensor:
    """Inner products of the updates, or of their differences to one of them, in one reading.

    Args:
        updates: n updates.
        centre: client whose update is subtracted from all; None for none.
        double: whether products are formed in float64; float64 updates always are.
        scale: power of two that float64 products' factors are multiplied with.

    Returns:
        (n, n) float64. Rows of updates that hold NaN or infinity, or whose products overflow, are not finite.
    """
    source = open_updates(updates)
    count = len(source.labels)
    total = torch.zeros(count, count, dtype=torch.float64, device=source.device)
    for _, piece in pieces(source, double=double):
        scaled = piece
        if scale != 1.0 and isinstance(piece, Tensor) and piece.dtype == torch.float64:
            scaled = piece * scale
        products.accumulate(total, scaled, centre=centre)
    return products.mirrored(total)


def half_gram(source: UpdateSource, whole: int) -> tuple[Tensor, float]:
    """Inner products of updates rounded to bfloat16, and the largest error that shows.

    To nearest is not quite without bias: a rounded update is on average a few millionths too short along itself. Its
    products are made longer by that.

    To be called where `products.HALF_PRECISION` holds.

    Args:
        source: n updates in main memory, none of them float64.
        whole: client whose products with all are formed of what was not rounded too, to show how wrong the others are.

    Returns:
        (n, n) float64, with squared lengths as they are; and the error relative to the lengths of the two updates, nan
        where some length is zero or not finite.
    """
    count = len(source.labels)
    total = torch.zeros(count, count + 3, dtype=torch.float64)
    for _, piece in pieces(source):
        products.accumulate_half(total, piece, whole)
    squares, rounded, known = total[:, count:].unbind(1)
    along = rounded / squares
    found = products.mirrored(total[:, :count].triu(1) / torch.outer(along, along) + squares.diag())
    sizes = squares.sqrt()
    return found, float(((found[whole] - known).abs() / (sizes * sizes[whole])).max())


def measure(updates: Updates | UpdateSource, prior_weights: Tensor, *, origin: bool = False) -> Geometry:
    """Inner products good enough to weigh clients by: finite, and checked for cancellation.

    Args:
        updates: n updates.
        prior_weights: (n,) float64, > 0; what each client counts before any rule has seen it.
        origin: whether the zero update must stay the reference, because norms count and not only differences.

    Raises:
        UpdateError: an update holds NaN or infinity, or is so far out of scale that even float64 products
            overflow; the message names each such client.
    """
    source = open_updates(updates)
    coordinates = sum(spec.numel for spec in source.layout.values())
    floats64 = all(spec.dtype == torch.float64 for spec in source.layout.values())
    numbers = coordinates * len(source.labels)
    small = numbers <= SMALL
    double = small or floats64
    start = None
    if not (double or origin or numbers <= QUICK):
        ratio, middle = sampled_cancellation(source, prior_weights)
        start = middle if ratio * _FLOAT32_ROUNDING > _DISTANCE_ERROR / 4 else None
    found = _finite(source, _read(source, start, double, 1.0, 0), prior_weights, coordinates)
    for _ in range(2):
        if found.centre is None and small and not origin:
            limit = 0.0
        else:
            limit = _DISTANCE_ERROR if found.rounding == _FLOAT32_ROUNDING else 1e-12
        spread, middle = cancellation(found.gram, prior_weights)
        if spread * found.rounding <= limit or found.centre == middle or (origin and found.rounding < 1e-10):
            break
        # With the zero update as the reference, more digits are the only remedy; else a nearer reference is.
        centre = None if origin else middle
        found = _read(source, centre, origin or found.rounding < 1e-10, found.scale, found.passes)
        found = _finite(source, found, prior_weights, coordinates)
    return found


def refine(source: UpdateSource, found: Geometry, prior_weights: Tensor) -> Geometry:
    """The same inner products in float64 about the medoid: the most exact this module can give."""
    centre = cancellation(found.gram, prior_weights)[1]
    return _read(source, centre, True, found.scale, found.passes)


def combine(
    updates: Updates | UpdateSource, weights: Tensor, *, centre: int | None = None, double: bool = False
) -> Tensor | dict[str, Tensor]:
    """`sum_i weights_i x_i`, of the kind and in the dtype of one update.

    A single weight of one returns that client's update bit for bit. Sums run in float64 for small inputs and float64
    updates, else in float32.

    Args:
        updates: n updates.
        weights: (n,) finite; need not sum to one.
        centre: client to sum differences to; only where the weights sum to one. Keeps the digits that a large
            common part would drown.
        double: whether to sum in float64.

    Raises:
        UpdateError: there are not as many weights as updates.
    """
    source = open_updates(updates)
    if weights.shape != (len(source.labels),):
        raise UpdateError(f"weights must be {len(source.labels)}, one an update, got shape {tuple(weights.shape)}")
    numbers = weights.tolist()
    chosen = [client for client, number in enumerate(numbers) if number != 0]
    layout = source.layout
    if len(chosen) == 1 and numbers[chosen[0]] == 1.0:
        return source.assemble({name: source.one(chosen[0], name).clone() for name in layout})
    if centre is None and 0 < len(chosen) <= len(weights) // 2:
        source, weights = source.select(chosen), weights[chosen]
    outlandish = not all(1e-30 <= abs(numbers[client]) <= 1e30 for client in chosen)
    double = double or outlandish or sum(spec.numel for spec in layout.values()) * len(source.labels) <= SMALL
    result = Assembly(source)
    read = pieces if centre is None else blocks
    for segments, piece in read(source, double=double):
        if isinstance(piece, Stretches):
            products.combine(piece, weights, result.parts(segments))
        else:
            base = 0.0 if centre is None else piece[centre]
            away = piece if centre is None else piece - base
            result.write(segments, base + torch.mv(away.T, weights.to(piece.device, piece.dtype)))
    return result.value()


def _read(source: UpdateSource, centre: int | None, double: bool, scale: float, passes: int) -> Geometry:
    singles = any(spec.dtype != torch.float64 for spec in source.layout.values()) and not double
    found = gram(source, centre=centre, double=double, scale=scale)
    return Geometry(found, centre, scale, _FLOAT32_ROUNDING if singles else _FLOAT64_ROUNDING, passes + 1)


def _finite(source: UpdateSource, found: Geometry, prior_weights: Tensor, coordinates: int) -> Geometry:
    """The geometry, read again in float64 or in another scale where products left the range of their dtype."""
    norms, prior = found.gram.numpy().diagonal(), prior_weights.numpy()
    broken = np.flatnonzero(~np.isfinite(norms)).tolist()
    require_finite(source, broken)
    if found.rounding == _FLOAT32_ROUNDING:
        tiny = float(prior[norms < coordinates * 1e-32].sum()) >= 0.3 * float(prior.sum())
        if broken or tiny:
            found = _read(source, found.centre, True, 1.0, found.passes)
            return _finite(source, found, prior_weights, coordinates)
        return found
    usual = lower_median(np.where(np.isfinite(norms), norms, np.inf))
    if found.scale == 1.0 and (broken or usual < 1e-200):
        largest = _magnitudes(source)
        typical = float(largest.median()) or float(largest.max())
        if typical == 0:
            return found
        scale = 2.0 ** -max(-1000, min(1000, math.frexp(typical)[1]))
        found = _read(source, found.centre, True, scale, found.passes)
        broken = torch.nonzero(~torch.isfinite(found.gram.diagonal())).flatten().tolist()
    if broken:
        reason = "is more than 1e150 times larger than most, beyond the range of float64 products"
        raise UpdateError("; ".join(f"{source.labels[client]} {reason}" for client in broken) + "; leave it out")
    return found


def require_finite(source: UpdateSource, clients: list[int]) -> None:
    """Raises an error that names those of the clients whose update holds a NaN or an infinity.

    Raises:
        UpdateError: there is such a client.
    """
    faults = []
    for client in clients:
        for name in source.layout:
            bad = int((~torch.isfinite(source.one(client, name))).sum())
            if bad:
                faults.append(f"{source.labels[client]}: {title(name)} holds {bad} NaN or infinite value(s)")
                break
    if faults:
        remedy = "expected finite numbers; leave these clients out or repair their updates"
        raise UpdateError("\n  - ".join([f"{len(faults)} unusable client update(s), {remedy}:", *faults]))


def _magnitudes(source: UpdateSource) -> Tensor:
    """(n,) float64 largest absolute coordinate of each update."""
    largest = torch.zeros(len(source.labels), dtype=torch.float64, device=source.device)
    for _, block in blocks(source, double=True):
        largest = torch.maximum(largest, block.abs().amax(1))
    return largest.cpu()


def sampled_cancellation(source: UpdateSource, prior_weights: Tensor) -> tuple[float, int]:
    """`cancellation` as a sample of the coordinates shows it, and the medoid; (0, 0) where some are not finite.

    A wrong answer costs a reading, never the result, for what it leads to is checked.

    Args:
        source: n updates.
        prior_weights: (n,) float64, > 0.
    """
    coordinates = sum(spec.numel for spec in source.layout.values())
    total = torch.zeros(len(source.labels), len(source.labels), dtype=torch.float64, device=source.device)
    step = coordinates // max(4, coordinates // (64 * PIECE))
    due, passed = step // 2, 0
    segments = []
    for name, spec in source.layout.items():
        while due < passed + spec.numel:
            start = min(due - passed, max(0, spec.numel - PIECE))
            segments.append(Segment(name, start, min(start + PIECE, spec.numel)))
            due += step
        passed += spec.numel
    for rows in sample(source, segments):
        products.accumulate(total, rows)
    total = products.mirrored(total)
    return cancellation(total, prior_weights) if bool(torch.isfinite(total.diagonal()).all()) else (0.0, 0)
