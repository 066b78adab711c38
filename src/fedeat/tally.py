"""What a client measures while it trains, for the records."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fedeat.perturbation import Norm, realised_norm
from fedeat.protocols import Batch
from fedeat.updates import Adapter, norm


@dataclass
class Tally:
    """Sums over a client's steps; tensors are read at the end alone, for an accelerator need not be awaited before.

    Attributes:
        share: 0..1, of a batch's samples that are perturbed; below 1, those left as they are have no length.
        losses: one a step.
        lengths: realised norm of the perturbation, one a perturbed step.
        tokens: of each batch.
        positions: of all batches, padding among them.
    """

    share: float = 1.0
    losses: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    positions: int = 0

    def add(self, batch: Batch, loss: Tensor, delta: Tensor | None, *, norm: Norm) -> None:
        """Counts one step."""
        self.losses.append(loss)
        if delta is not None:
            chosen = None if self.share == 1 else delta.flatten(1).any(1)
            self.lengths.append(realised_norm(delta, batch.perturbable, norm=norm, samples=chosen))
        self.tokens.append(batch.attention_mask.sum())
        self.positions += batch.attention_mask.numel()

    def metrics(self, update: Adapter, *, unit: float) -> dict[str, float]:
        """The mean training loss, the number of steps, the mean realised norm over `unit`, and the share of padding."""
        return {
            "loss": _mean(self.losses),
            "steps": float(len(self.losses)),
            "perturbation": _mean(self.lengths) / unit,
            "padding": 1.0 - sum(map(int, self.tokens)) / self.positions if self.positions else 0.0,
            "update_norm": norm(update),
        }


def _mean(values: list[Tensor]) -> float:
    return sum(map(float, values)) / len(values) if values else 0.0
