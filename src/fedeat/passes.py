"""A model's losses on one batch as functions of the perturbation, and the way out when memory does not suffice.

`attacked` is what an ascent raises, `trained` what a step lowers. Both are built from the losses of the supervised
rows, which `Model.supervised_losses` gives; nothing here knows a model library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedeat.objective import LossOfDelta, sum_over_samples
from fedeat.perturbation import Perturb
from fedeat.protocols import Batch, Model
from fedeat.updates import Adapter

B = TypeVar("B", bound=Batch)

Gradient: TypeAlias = Callable[[Model[B], B, torch.Generator], tuple[Tensor, Tensor | None]]
"""(model, batch, generator) -> the loss and the perturbation, detached; the adapter's gradients are left in `.grad`."""


def attacked(model: Model[B], batch: B) -> LossOfDelta:
    """Sum over samples of each sample's mean loss."""
    return lambda delta: sum_over_samples(model.supervised_losses(batch, delta), batch.samples)


def trained(model: Model[B], batch: B) -> LossOfDelta:
    """Mean loss of the supervised rows; one mean a client where a batch holds several clients'."""
    return lambda delta: batch.mean(model.supervised_losses(batch, delta))


def on_share(perturb: Perturb, model: Model[B], batch: B, generator: torch.Generator, *, share: float) -> Tensor:
    """Perturbation (B, T, H) of a share of the samples, drawn at random; zero at the others, which are not run.

    Args:
        share: 0..1; the number of samples is rounded up.
    """
    size = len(batch.attention_mask)
    count = math.ceil(round(share * size, 9))  # .07 * 100 is a little above 7 in floating point
    if count == size:
        return perturb(attacked(model, batch), model.embed(batch), batch.perturbable, generator)
    drawn = sorted(torch.randperm(size, generator=generator, device=generator.device)[:count].tolist())
    delta = torch.zeros(model.embed(batch).shape, device=batch.perturbable.device)
    if drawn:
        part = batch.select(drawn)
        delta[drawn] = perturb(attacked(model, part), model.embed(part), part.perturbable, generator)
    return delta


@dataclass(frozen=True)
class InParts(Generic[B]):
    """A model that runs a batch in parts and keeps no activations between them, so that one part must fit at a time.

    The parts' activations are computed again in the backward pass: half as much work again, the same results to float
    tolerance, as long as the adapter has no dropout, whose draws depend on the size of a batch.

    Attributes:
        model: which.
        parts: >= 1; more than there are samples are as many.
    """

    model: Model[B]
    parts: int

    def supervised_losses(self, batch: B, delta: Tensor | None = None) -> Tensor:
        return self._run(self.model.supervised_losses, batch, delta)

    def supervised_logits(self, batch: B, delta: Tensor | None = None) -> Tensor:
        return self._run(self.model.supervised_logits, batch, delta)

    def first_layer(self, batch: B, delta: Tensor | None = None) -> Tensor:
        return self.model.first_layer(batch, delta)

    def from_first_layer(self, batch: B, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.model.from_first_layer(batch, delta)

    def adapter(self) -> dict[str, Tensor]:
        return self.model.adapter()

    def load_adapter(self, adapter: Adapter) -> None:
        self.model.load_adapter(adapter)

    def adapter_parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return self.model.adapter_parameters()

    def embed(self, batch: B) -> Tensor:
        return self.model.embed(batch)

    def training(self) -> AbstractContextManager[None]:
        return self.model.training()

    def attacking(self) -> AbstractContextManager[None]:
        return self.model.attacking()

    def split(self, batch: B) -> list[tuple[slice, B]]:
        """The parts of a batch, and which of its samples each holds."""
        size = len(batch.attention_mask)
        shares = [part.tolist() for part in torch.arange(size).tensor_split(min(self.parts, size))]
        return [(slice(part[0], part[-1] + 1), batch.select(part)) for part in shares]

    def _run(self, run: Callable[[B, Tensor | None], Tensor], batch: B, delta: Tensor | None) -> Tensor:
        pieces = []
        for samples, part in self.split(batch):
            piece = None if delta is None else delta[samples]
            pieces.append(checkpoint(run, part, piece, use_reentrant=False))
        return torch.cat(pieces)


def fitting(model: Model[B], batch: B) -> list[tuple[slice, B]]:
    """What of a batch must fit into memory at a time, for passes that keep activations: all, or a model's parts."""
    return model.split(batch) if isinstance(model, InParts) else [(slice(None), batch)]


def in_memory(gradient: Gradient[B], model: Model[B], batch: B, generator: torch.Generator, parts: int) -> _Found:
    """A batch's gradient, in twice as many parts as long as memory runs out.

    Args:
        gradient: how the gradient comes about.
        model: which; gradients that a failed attempt left are cleared.
        batch: B samples.
        generator: its state before a failed attempt is restored.
        parts: >= 1, where to begin; what sufficed for the last batch.

    Returns:
        The loss, the perturbation, and the parts that sufficed.

    Raises:
        torch.OutOfMemoryError: a single sample does not fit.
    """
    state = generator.get_state()
    while True:
        try:
            loss, delta = gradient(model if parts == 1 else InParts(model, parts), batch, generator)
            return loss, delta, parts
        except torch.OutOfMemoryError:
            if parts >= len(batch.attention_mask):
                raise
        # Outside of the handler, whose error would keep the failed attempt's activations alive.
        for parameter in model.adapter_parameters().values():
            parameter.grad = None
        generator.set_state(state)
        parts = min(2 * parts, len(batch.attention_mask))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_Found: TypeAlias = tuple[Tensor, Tensor | None, int]
