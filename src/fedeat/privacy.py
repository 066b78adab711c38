"""Differential privacy of single records: each sample's gradient is clipped, and noise is added to their sum.

DP-SGD (Abadi et al., 2016, Algorithm 1), for the adapter's parameters alone. Samples are worked on one at a time: the
perturbation of a sample depends on that sample, and its gradient too, so that a sum moves by at most the clip where one
record is replaced by an empty one, which adds nothing (zero-out adjacency), and by at most twice the clip where it is
replaced by another. The number of records is public: batches are drawn by it, so that one record more or less would
change them all, which nothing here covers. Nor is there amplification by sampling: batches are drawn without looking at
the data, each record is in at most one batch of an epoch, and an epoch counts as one release.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedeat.passes import B, Gradient
from fedeat.protocols import Model


def private(
    gradient: Gradient[B],
    *,
    clip: float,
    noise_multiplier: float,
    batch_size: int,
    noise: torch.Generator | None = None,
) -> Gradient[B]:
    """A gradient that tells little of any one sample.

    Args:
        gradient: of a batch of one sample.
        clip: > 0 and finite, a sample's gradient is shortened to this L2 norm.
        noise_multiplier: >= 0, standard deviation of the noise in each coordinate over `clip`.
        batch_size: >= 1, what the sum is divided by, whatever the batch at hand holds.
        noise: where the noise is drawn, on the CPU, and perturbations too, for one record's length changes what is
            drawn for the next: whoever knew the draws would see it. None for the generator of the perturbation.

    Returns:
        As `Gradient`; the loss is the mean over samples.
    """

    def found(model: Model[B], batch: B, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        parameters = list(model.adapter_parameters().values())
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        losses: list[Tensor] = []
        source = generator if noise is None else noise
        deltas: list[Tensor] = []
        for sample in range(len(batch.attention_mask)):
            for parameter in parameters:
                parameter.grad = None
            loss, delta = gradient(model, batch.select([sample]), source)
            losses.append(loss.reshape(()))
            deltas += [] if delta is None else [delta]
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            length = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
            # A gradient that is not finite says nothing, and must not reach the sum.
            share = min(1.0, clip / length) if 0 < length < math.inf else 0.0
            for total, part in zip(totals, parts, strict=True):
                if share:
                    total += share * part
        for parameter, total in zip(parameters, totals, strict=True):
            drawn = torch.randn(total.shape, generator=source, device=source.device).to(total)
            parameter.grad = (total + noise_multiplier * clip * drawn) / batch_size
        return torch.stack(losses).mean(), torch.cat(deltas) if deltas else None

    return found
