"""Which radius suits a model: its losses and accuracies along a grid of radii (the paper's open limitation, Sec. 8).

A radius that trains well raises the loss and leaves something to learn. The one recommended is the largest of the
grid at which the attack takes away at most half of what the model can do on clean inputs: half of its accuracy above
chance on supervised tokens or classes. It is a rule of thumb that a validation run should confirm, and it speaks of
the model as it is: calibrate the model that will be attacked, with an adapter where there is one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fedeat import seeding
from fedeat.data import Batch, Encoded
from fedeat.errors import DataError
from fedeat.model import AdaptedModel
from fedeat.objective import sample_sum
from fedeat.perturbation import Norm, Perturb, pgd, random

GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Radii tried by default, relative to the mean embedding norm."""


@dataclass(frozen=True)
class Point:
    """What one radius does.

    Attributes:
        radius: relative to the mean embedding norm.
        clean_loss: mean cross-entropy a sample without a perturbation.
        adversarial_loss: the same at the perturbation that PGD finds.
        random_loss: the same at a random perturbation of that length; an attack that is no stronger is broken.
        accuracy: share of supervised tokens or classes that the model gets right without a perturbation.
        adversarial_accuracy: the same at the perturbation that PGD finds.
    """

    radius: float
    clean_loss: float
    adversarial_loss: float
    random_loss: float
    accuracy: float
    adversarial_accuracy: float


@dataclass(frozen=True)
class Calibration:
    """The points of a grid and the radius it recommends.

    Attributes:
        points: one a radius, in rising order.
        chance: accuracy of always giving the most frequent target.
        recommended: a radius of the grid, None where even the smallest takes too much.
        examples: how many were used.
    """

    points: tuple[Point, ...]
    chance: float
    recommended: float | None
    examples: int

    def record(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


def calibrate(
    model: AdaptedModel,
    encoded: Sequence[Encoded],
    *,
    radii: Sequence[float] = GRID,
    steps: int = 10,
    norm: Norm = "l2",
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Calibration:
    """Attacks a model at every radius of a grid.

    Args:
        model: with its adapter, where it has one.
        encoded: labelled or answered examples.
        radii: > 0, relative.
        steps: >= 1, of PGD; more than training uses, so that a weak attack does not pass for a robust model.
        norm: which ball.
        batch_size: >= 1, examples a forward pass.
        seed: of the random perturbations.
        progress: told batches done, and of how many.

    Raises:
        DataError: no example has an answer or a label to be right about.
    """
    unit = model.embedding_unit(norm)
    order = sorted(encoded, key=lambda item: len(item.input_ids))
    batches = [model.collate(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    targets = torch.cat([batch.targets for batch in batches]).tolist()
    if not targets:
        raise DataError("nothing to calibrate on: no example has an answer. Give training data with answers.")
    chance = Counter(targets).most_common(1)[0][1] / len(targets)
    total = len(batches) * (1 + len(radii))
    clean = _Tally()
    for done, batch in enumerate(batches, start=1):
        clean.add(model, batch, None)
        progress("calibrate", done, total)
    points = []
    for index, radius in enumerate(sorted(radii)):
        attack: Perturb = functools.partial(pgd, radius=radius * unit, steps=steps, norm=norm)
        noise: Perturb = functools.partial(random, radius=radius * unit, norm=norm)
        attacked, random_ = _Tally(), _Tally()
        for number, batch in enumerate(batches):
            generator = seeding.generator(seed, "calibration", index, number)
            attacked.add(model, batch, _find(model, batch, attack, generator))
            random_.add(model, batch, _find(model, batch, noise, generator))
            progress("calibrate", len(batches) * (1 + index) + number + 1, total)
        points.append(Point(radius, clean.loss, attacked.loss, random_.loss, clean.accuracy, attacked.accuracy))
    return Calibration(tuple(points), chance, recommend(points, chance=chance), len(encoded))


def recommend(points: Sequence[Point], *, chance: float) -> float | None:
    """The largest radius up to which the attack leaves at least half of the accuracy above chance.

    Args:
        points: in rising order of radius.
        chance: 0..1, accuracy that needs no input.

    Returns:
        A radius of the points; None where even the smallest takes more, or the model is no better than chance.
    """
    best = None
    for point in points:
        if point.accuracy <= chance or point.adversarial_accuracy < (chance + point.accuracy) / 2:
            break
        best = point.radius
    return best


class _Tally:
    """Sums of losses a sample and of right rows."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._samples = self._right = self._rows = 0

    def add(self, model: AdaptedModel, batch: Batch, delta: Tensor | None) -> None:
        with model.evaluating():
            logits = model.supervised_logits(batch, delta)
        self._loss += float(sample_sum(logits, batch.targets, batch.samples))
        self._samples += len(batch.input_ids)
        self._right += int((logits.argmax(-1) == batch.targets).sum())
        self._rows += len(batch.targets)

    @property
    def loss(self) -> float:
        return self._loss / self._samples

    @property
    def accuracy(self) -> float:
        return self._right / self._rows


def _find(model: AdaptedModel, batch: Batch, perturb: Perturb, generator: torch.Generator) -> Tensor:
    with model.attacking():
        return perturb(
            lambda delta: sample_sum(model.supervised_logits(batch, delta), batch.targets, batch.samples),
            model.embed(batch),
            batch.perturbable,
            generator,
        )
