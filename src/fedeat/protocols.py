"""What both algorithms ask of the things they are given: a batch, a model with an adapter, an aggregate.

Any class with these attributes will do; the algorithms know no model library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from fedeat.updates import Adapter


class Batch(Protocol):
    """What the algorithm reads of a batch of B samples and T tokens; `fedeat.data.Batch` is one."""

    @property
    def perturbable(self) -> Tensor:
        """(B, T) bool, True where a perturbation may act."""

    @property
    def targets(self) -> Tensor:
        """(N,) int64, what each supervised row must predict."""

    @property
    def samples(self) -> Tensor:
        """(N,) int64, the sample each supervised row belongs to."""

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) int64, 1 at tokens."""

    def mean(self, losses: Tensor) -> Tensor:
        """Training loss, the mean of the supervised rows' losses (N,); of several clients' batches one each, (m,)."""

    def select(self, samples: Sequence[int]) -> Self:
        """Some of the samples, in the order given, padded to the same T."""


B_contra = TypeVar("B_contra", bound=Batch, contravariant=True)


class Model(Protocol[B_contra]):
    """What the algorithm asks of a model with an adapter; `fedeat.model.AdaptedModel` is one."""

    def adapter(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors."""

    def load_adapter(self, adapter: Adapter) -> None:
        """Overwrites the adapter's tensors."""

    def adapter_parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The adapter's trainable parameters, the same names as `adapter`."""

    def embed(self, batch: B_contra) -> Tensor:
        """(B, T, H), the embeddings that the first layer sees."""

    def supervised_logits(self, batch: B_contra, delta: Tensor | None = None) -> Tensor:
        """(N, V), logits of the supervised rows with `delta` (B, T, H) added to the embeddings."""

    def supervised_losses(self, batch: B_contra, delta: Tensor | None = None) -> Tensor:
        """(N,) float32, cross-entropy of the supervised rows with `delta` (B, T, H) added to the embeddings."""

    def first_layer(self, batch: B_contra, delta: Tensor | None = None) -> Tensor:
        """(B, T, H), the first layer's output; nothing behind it is run. Asked for by YOPO alone."""

    def from_first_layer(self, batch: B_contra, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The supervised losses and, from the same pass, the first layer's output. Asked for by YOPO alone."""

    def training(self) -> AbstractContextManager[None]:
        """Mode of a training step: the adapter's dropout on."""

    def attacking(self) -> AbstractContextManager[None]:
        """Mode of the ascent: all dropout off, no gradient for any parameter."""


class Aggregated(Protocol):
    """What the algorithm reads of an aggregate; `fedeat.aggregation.Aggregate` is one."""

    @property
    def value(self) -> Adapter:
        """The one update that stands for all."""

    @property
    def weights(self) -> Tensor:
        """(n,) float64, how much each update counted; sums to 1."""

    @property
    def iterations(self) -> int:
        """>= 0, iterations of the rule."""

    @property
    def gap(self) -> float:
        """Certified relative distance to the optimum; NaN where the rule certifies nothing."""
