"""What inner products that are not exact are good for, once exact distances from a point are at hand.

The products may come from a sample of the coordinates (`sampling`) or from rounded ones (`half_precision`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedeat.aggregation.iterates import State, newton_direction
from fedeat.geometry.distances import Matrix, Vector


def in_range(gram: Tensor, coordinates: int) -> bool:
    """Whether products are finite and not so small that float32 lost their digits."""
    norms = gram.diagonal()
    return bool(torch.isfinite(norms).all()) and float(norms.median()) > coordinates * 1e-32


def measurable(radii: Vector) -> bool:
    """Whether distances from a point are finite, and no update so near to it that it may be the optimum."""
    return bool(np.isfinite(radii).all()) and float(radii.min()) >= 1e-3 * float(np.median(radii))


def correction(curvature: Matrix, prior: Vector, state: State) -> tuple[Vector, float]:
    """The step from a point whose distances are exact, and the relative excess of the objective that it would remove.

    Exact distances make the gradient exact, as coefficients; only the curvature is approximate.
    """
    newton = newton_direction(curvature, state)
    move = state.step if newton is None else newton
    gained = float(state.pulls.sum()) * float(move @ (curvature @ state.step))
    return move, abs(gained / float(prior @ state.radii))
